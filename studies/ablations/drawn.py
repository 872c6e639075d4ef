"""Data drawn once: the micro-batches of a recipe, as the loader makes them, in files that all runs of it read.

Runs of one seed read the very same batches. From files of pictures a sample costs a core about a millisecond, from
these a fiftieth of that: so one process feeds a run, and drawing, which takes many, needs no GPU and no waiting.

FOLDER/000000.safetensors, ...   a micro-batch of each step
FOLDER/drawn.json                how many, and the hash of their order; it is there only when all are
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlmamba.data.collate import Batch
from vlmamba.data.loading import Feed, MicroBatches
from vlmamba.data.processes import context
from vlmamba.data.sampling import Row
from vlmamba.data.sources import Source, open_source
from vlmamba.evaluation.files import dump_json, write_atomically
from vlmamba.models.processor import VLMambaProcessor
from vlmamba.training import build, launch
from vlmamba.training.config import RunConfig
from vlmamba.training.parallel import World

LIST = "drawn.json"


def draw(recipe: RunConfig, folder: Path, workers: int) -> None:
    """Writes the batch of every step of the recipe; what an earlier sitting wrote is kept.

    Args:
        recipe: with sizes in place of parts that need not be there yet; one micro-batch a step.
        workers: processes; 0 draws in this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with build.quiet():
        processor = build.build(recipe.model, recipe.stage.image_mode)[1]
    feed = launch.make_feed(recipe, processor, torch.device("cpu"))
    steps = recipe.optim.max_steps or 0
    drawing = _Drawing(feed, folder, steps)
    for _ in DataLoader(
        drawing, batch_size=None, num_workers=workers, multiprocessing_context=context() if workers else None
    ):
        pass
    write_atomically(folder / LIST, dump_json({"steps": steps, "order": order_hash(feed, steps)}))


def order_hash(feed: Feed, steps: int) -> str:
    """Of the samples, by source and index, in the order of all steps."""
    digest = hashlib.sha256(json.dumps([source.fingerprint() for source in feed.data.sources]).encode())
    for step in range(steps):
        digest.update(str(feed.order.rows(step)).encode())
    return digest.hexdigest()[:16]


def order_of(folder: Path) -> str:
    """The hash of the order in which the samples of a folder stand."""
    return str(json.loads((folder / LIST).read_text())["order"])


def feed_from(folder: Path) -> Callable[[RunConfig, VLMambaProcessor, torch.device, World], Feed]:
    """The maker of a run's feed that reads what was drawn.

    The feed raises ValueError where fewer steps were drawn than the recipe has.
    """

    def make(config: RunConfig, processor: VLMambaProcessor, device: torch.device, world: World) -> Feed:
        steps = int(json.loads((folder / LIST).read_text())["steps"])
        if steps < (config.optim.max_steps or 0):
            raise ValueError(f"{folder}: holds {steps} steps, the recipe has {config.optim.max_steps}; remove it")
        data = _Drawn([open_source(source) for source in config.data], folder)
        return Feed(data, _Steps(steps), 1, config.workers, pinned=device.type == "cuda")

    return make


@dataclass
class _Drawing(Dataset):
    """Step to nothing: its batch is written by whoever asks for it."""

    feed: Feed
    folder: Path
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> int:
        file = _file(self.folder, step)
        if not file.exists():
            scratch = file.with_suffix(f".{os.getpid()}")
            _write(self.feed.data[self.feed.order.rows(step)], scratch)
            os.replace(scratch, file)
        return step


class _Drawn(MicroBatches):
    """The key of a step to its batch."""

    def __init__(self, sources: Sequence[Source], folder: Path):
        self.sources, self.folder = sources, folder

    def __getitem__(self, keys: list[Row]) -> Batch:
        return _read(_file(self.folder, keys[0][0][1]))


@dataclass
class _Steps:
    """An order whose only row is the number of the step; after the last one comes the first, for those who read on."""

    steps_per_epoch: int
    batch: int = 1

    def rows(self, step: int) -> list[Row]:
        return [[(0, step % self.steps_per_epoch)]]

    def steps(self, epochs: float) -> int:
        return max(1, round(self.steps_per_epoch * epochs))


def _file(folder: Path, step: int) -> Path:
    return folder / f"{step:06d}.safetensors"


def _write(batch: Batch, file: Path) -> None:
    held = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in vars(batch).items() if name not in held}
    save_file(held, file, {"rest": json.dumps(rest)})


def _read(file: Path) -> Batch:
    with safe_open(file, "pt") as stored:
        rest: dict[str, Any] = json.loads(stored.metadata()["rest"])
        held = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    return Batch(**held, **rest | {name: tuple(rest[name]) for name in ("ids", "skipped")})
