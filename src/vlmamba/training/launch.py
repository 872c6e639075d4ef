"""One run: from a recipe to a folder with a model that `from_pretrained` loads.

OUTPUT/config.yaml, versions.json   what was asked for, and of what software (git state included)
OUTPUT/data.json                    which data: number of samples and hash of every source
OUTPUT/metrics.jsonl, curve.html    what happened; curve.svg, tensorboard/
OUTPUT/checkpoints/                 the state to go on from
OUTPUT/adapter/                     what LoRA learned, as PEFT reads it; model/ has it merged
OUTPUT/model/                       the result; it is there only when the run is finished
"""

from __future__ import annotations

import json
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

import vlmamba
from vlmamba.data.encoding import Encoder
from vlmamba.data.loading import Feed, open_feed
from vlmamba.data.packing import PackedOrder
from vlmamba.models.processor import VLMambaProcessor
from vlmamba.training import build
from vlmamba.training.card import recipe_text, write_card
from vlmamba.training.config import PARTS, ConfigError, RunConfig, parse
from vlmamba.training.curve import draw_curves, write_page
from vlmamba.training.estimate import parts_of
from vlmamba.training.lora import add_adapters, merged, save_adapters
from vlmamba.training.metrics import Logger, read_metrics
from vlmamba.training.optimizer import MODULES, freeze, make_optimizer, parameter_groups
from vlmamba.training.parallel import Parallel, World, full, joined
from vlmamba.training.step import Step
from vlmamba.training.trainer import Trainer

FeedMaker = Callable[[RunConfig, VLMambaProcessor, torch.device, World], Feed]
ADAPTER_FOLDER = "adapter"
_FREE = ("output", "workers", "device", "parallel", "logging", "checkpoint")
"""What may differ between the sittings of a run: it does not change what is computed."""


def run(config: RunConfig, feed_maker: FeedMaker | None = None) -> Path:
    """Trains as the recipe says, or goes on where an earlier sitting stopped; returns the model's folder.

    A run that is finished is left alone.

    Args:
        feed_maker: where batches come from, if not from `make_feed`.

    Raises:
        ConfigError: the output folder holds a run of another recipe.
        Interrupted (a SystemExit): SIGTERM or SIGINT came; the state was saved.
        NonFiniteError, BadDataError, CheckpointError: as they say.
    """
    with joined(config.device) as world:
        return _run(config, world, feed_maker or make_feed)


def _run(config: RunConfig, world: World, feed_maker: FeedMaker) -> Path:
    folder = Path(config.output)
    result = folder / build.MODEL_FOLDER
    world.from_main(lambda: _claim(folder, config))
    if world.from_main(result.is_dir):
        if world.is_main:
            print(f"{folder}: finished already; its model is in {result}", flush=True)
        return result
    device = pick_device(config.device, world)
    seed_all(config.seed)
    with build.quiet():
        model, processor = build.build(config.model, config.stage.image_mode)
    step = make_step(model, processor, config, device, world)
    logger = Logger(folder, folder.name, config.logging.tensorboard, world.is_main)
    try:
        feed = feed_maker(config, processor, device, world)
        world.from_main(lambda: note_data(feed, folder))
        trainer = Trainer(config, step, feed, folder, logger)
        for line in summary(model, config, trainer, device):
            logger.say(line)
        trainer.resume()
        trainer.train()
        _finish(model, processor, config, trainer, result)
        logger.say(f"finished in {trainer.progress.seconds / 60:.1f} minutes: {result}")
    finally:
        logger.close()
    return result


def make_step(
    model: build.Model, processor: VLMambaProcessor, config: RunConfig, device: torch.device, world: World | None = None
) -> Step:
    """What a step of this run is: the model frozen, prepared and put on its device or cut over several."""
    if config.optim.capture and world is not None and world.size > 1:
        raise ConfigError(f"optim.capture: is for one process, not for {world.size} of {config.parallel}; leave it out")
    if config.lora is not None:
        add_adapters(model, config.lora)
    freeze(model, config.stage, config.lora.parts if config.lora is not None else ())
    prepare(model, config)
    bf16 = config.optim.bf16 and device.type == "cuda"
    parallel = Parallel(model, world or World(), device, config.parallel, bf16)
    # After cutting: the optimiser holds the shards.
    optimizer = make_optimizer(parameter_groups(model, config.stage), config.optim, device)
    capture = config.optim.capture and device.type == "cuda"
    return Step(model, optimizer, device, processor.normalise, config.optim.grad_clip, bf16, parallel, capture)


def pick_device(name: str, world: World | None = None) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; of several processes each has a GPU of its own. A GPU chosen by
    number becomes the current one: kernels, events and generators go by that."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and world is not None and world.size > 1:
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device: {name!r} was asked for, but torch sees {count or 'no'} CUDA devices here")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def prepare(model: Any, config: RunConfig) -> None:
    """Training mode, evaluation mode for frozen parts; activation checkpointing and compilation where asked for."""
    model.train()
    for part in PARTS:
        module = getattr(model, MODULES[part], None)
        if module is not None and getattr(config.stage, part).lr == 0:
            module.eval()
    language = getattr(model, MODULES["language"], model)
    language.train()  # a frozen language model still has to give its loss without logits; it has no dropout
    share = float(config.optim.checkpoint_activations)
    if share:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for i, block in enumerate(language.backbone.layers):
            block.gradient_checkpointing = int((i + 1) * share) > int(i * share)
    if config.optim.compile:
        # Block by block: one compilation serves them all, and whatever is put around them later stays outside.
        for module in model.modules():
            if type(module).__name__ in model._no_split_modules:
                module.compile()


def make_feed(config: RunConfig, processor: VLMambaProcessor, device: torch.device, world: World | None = None) -> Feed:
    """The run's data, in order; of several processes, this one's share."""
    optim, world = config.optim, world or World()
    return open_feed(
        config.data,
        Encoder(processor, config.stage.template, config.stage.image_mode, optim.max_length),
        batch=optim.global_batch,
        micro_batch=optim.micro_batch,
        seed=config.seed,
        pack_into=(optim.pack_into or optim.max_length) if optim.pack else None,
        group_by_length=optim.group_by_length,
        workers=config.workers,
        pinned=device.type == "cuda",
        cache=Path(config.output),
        rank=world.rank,
        world=world.size,
    )


def summary(model: nn.Module, config: RunConfig, trainer: Trainer, device: torch.device) -> Iterator[str]:
    """What is about to be trained, on what, for how long."""
    yield from (part.line() for part in parts_of(model, config))
    yield trainer.feed.describe()
    if config.optim.capture and trainer.step.captured is None:
        yield f"optim.capture: graphs are for CUDA, and this is the {device.type}: ignored"
    optim = config.optim
    budget = "" if optim.time_budget is None else f" or {optim.time_budget:g} minutes"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    size = trainer.world.size
    several = f"{size} processes ({config.parallel}), each " if size > 1 else ""
    planned = isinstance(trainer.feed.order, PackedOrder)  # whose samples a step stand in the line above
    batch = "" if planned else f" of {optim.global_batch} samples (micro-batches of {optim.micro_batch})"
    yield f"{trainer.total_steps} steps{budget}{batch} on {several}{name}, {config.workers} loader workers"


def _finish(model: Any, processor: VLMambaProcessor, config: RunConfig, trainer: Trainer, result: Path) -> None:
    """Writes the model aside and renames it, so that a result is whole or absent."""
    folder = result.parent
    state = whole_state(model, trainer.world)
    if trainer.world.is_main:
        lines = read_metrics(trainer.logger.file)
        draw_curves({folder.name: lines}, folder / "curve.svg")
        write_page({folder.name: lines}, folder / "curve.html")
        scratch = folder / f".writing-{result.name}"
        shutil.rmtree(scratch, ignore_errors=True)
        if config.lora is not None:
            trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            save_adapters(state, trained, config.lora, config.model.path, folder / ADAPTER_FOLDER)
            state = merged(state, config.lora)
        try:
            with build.quiet():
                build.save(model, processor, scratch, state)
        except SafetensorError as error:
            raise OSError(f"{scratch}: the model could not be written ({error}); its checkpoint is untouched") from None
        write_card(scratch, model, config, trainer.progress.seconds, lines[-1]["loss"] if lines else None)
        os.replace(scratch, result)
    trainer.world.sum([0])  # the others wait until it is there


def note_data(feed: Feed, folder: Path) -> None:
    """Which data a run is about to read; a warning where they changed since its last sitting."""
    found = [
        {"name": str(source.name), "samples": source.supply.size, "hash": source.fingerprint()}
        for source in feed.data.sources
    ]
    file = folder / "data.json"
    if file.is_file() and json.loads(file.read_text()) != found:
        print(f"{folder}: the data are not those that this run began with ({file})", file=sys.stderr, flush=True)
    file.write_text(json.dumps(found, indent=1))


def whole_state(model: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """All parameters, uncut, on the main process's CPU (tied ones once); all processes must ask for it together.
    Buffers are none of a checkpoint's business here."""
    state = {}
    for name, parameter in model.named_parameters():
        whole = full(parameter.detach())
        if world.is_main:
            state[name] = whole.cpu()
    return state


def _claim(folder: Path, config: RunConfig) -> None:
    """Makes the run's folder, or checks that the one there belongs to the same recipe. One that ended before it had
    anything to go on from, as with a misspelled file, is begun anew."""
    asked = {key: value for key, value in asdict(config).items() if key not in _FREE}
    file = folder / "config.yaml"
    scratch = folder / f".writing-{file.name}"
    begun = (folder / build.MODEL_FOLDER).is_dir() or any(folder.glob("checkpoints/step-*"))
    if file.is_file() and begun:
        stored = asdict(parse(RunConfig, file))  # options that are newer than the run have their defaults
        differing = list(_differences({k: v for k, v in stored.items() if k not in _FREE}, asked))
        if differing:
            raise ConfigError(
                f"{folder}: holds a run of another recipe ({'; '.join(differing[:5])}). Name another output folder, "
                "or remove that one"
            )
        return
    if folder.is_dir() and not file.is_file() and any(found != scratch for found in folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty and holds no run (no config.yaml); name another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    scratch.write_text(recipe_text(config))
    os.replace(scratch, file)
    (folder / "data.json").unlink(missing_ok=True)
    (folder / "versions.json").write_text(json.dumps(versions(), indent=1))


def _differences(stored: Any, asked: Any, name: str = "") -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in [*stored, *(k for k in asked if k not in stored)]:
            yield from _differences(stored.get(key), asked.get(key), f"{name}.{key}".lstrip("."))
    elif stored != asked:
        yield f"{name} was {stored}, now {asked}"


def versions() -> dict[str, str | None]:
    """Of everything that a run's numbers depend on."""
    return {
        "vlmamba": vlmamba.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "git": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the source that runs, with a `+` if it was changed since; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "."))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
