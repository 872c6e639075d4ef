"""Checkpoints that are complete or not there: written aside, synced, hashed, and only then given their name.

    checkpoints/step-000200/{__0_0.distcp, ..., .metadata, random.json, state.json, manifest.json}

Tensors are in the format of `torch.distributed.checkpoint`, so that any number of processes can go on from what any
other number wrote. Writing happens in the background, from a copy. Only trained parameters are kept: frozen ones are
read from where the recipe says.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from vlmamba.training.parallel import World

MANIFEST = "manifest.json"
_SCRATCH = ".writing-"
_MOST_THREADS = 8


@dataclass
class Progress:
    """Where a run stands. `step` alone is the position in the data.

    Attributes:
        step: optimiser steps done.
        seconds: spent in training so far, over all sittings.
        samples, tokens, skipped: read so far; skipped samples could not be used.
    """

    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are untouched."""


class Checkpoints:
    """The checkpoints of a run, in a folder.

    Args:
        keep: how many of the newest stay.
        sharded: whether each process holds a part of the tensors (FSDP). Otherwise all hold the same and the main one
            writes.
    """

    def __init__(self, folder: Path, keep: int, world: World | None = None, sharded: bool = False):
        self.folder, self.keep, self.world, self.sharded = folder, keep, world or World(), sharded
        # Its own gloo group: on the default one it would get between the collectives of the training step.
        self._group = dist.new_group(backend="gloo") if sharded else None
        # One process alone is no mistake of ours.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        self._writing: threading.Thread | None = None
        self._error: BaseException | None = None
        self._newest: Path | None = None

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> Path:
        """Copies the complete state of the run and begins to write it; returns where it will be.

        Raises:
            CheckpointError: the one before could not be written: the disk is full, or the like.
        """
        self.wait()
        final = self.folder / f"step-{progress.step:06d}"
        if final == self._newest:
            return final
        scratch = self.folder / f"{_SCRATCH}{final.name}"
        if self.world.is_main:
            for stale in self.folder.glob(f"{_SCRATCH}*"):
                shutil.rmtree(stale, ignore_errors=True)
        generators = self.world.gather(random_state())  # and nobody goes on before the main process has cleared the way
        if self.sharded or self.world.is_main:
            tensors = {name: _copy(tensor) for name, tensor in _tensors(model, optimizer).items()}
            arguments = (final, scratch, tensors, generators, replace(progress))
            # Not a daemon: an interpreter that ends waits for what it has begun to write.
            self._writing = threading.Thread(target=self._write, args=arguments)
            self._writing.start()
        self._newest = final
        return final

    def wait(self) -> None:
        """Until the last one is on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        self.settle()
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(
                f"{self._newest} could not be written ({_reason(error)}); earlier checkpoints are untouched"
            ) from error

    def settle(self) -> None:
        """Until nothing is being written, well or ill."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Path, Progress] | None:
        """Puts the newest whole state back: trained parameters, moments, random number generators."""
        found = self.world.from_main(lambda: find_latest(self.folder))
        if found is None:
            return None
        _make_moments(optimizer)
        tensors = _tensors(model, optimizer)
        reader = _Reader(found)
        stored = set(reader.read_metadata().state_dict_metadata)
        odd = sorted(stored ^ tensors.keys())
        if odd:
            raise ValueError(f"{found} was made by another run: {odd[0]} and {len(odd) - 1} more differ")
        dcp.load(tensors, storage_reader=reader, process_group=self._group, no_dist=not self.sharded)
        generators = json.loads((found / "random.json").read_text())
        if self.world.rank < len(generators):
            set_random_state(generators[self.world.rank])
        self._newest = found
        return found, Progress(**json.loads((found / "state.json").read_text()))

    def _write(self, final: Path, scratch: Path, tensors: dict[str, Tensor], generators: Any, at: Progress) -> None:
        """In the background; what goes wrong is told by the next `wait`."""
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            writer = dcp.FileSystemWriter(scratch, thread_count=_threads(tensors))
            options = {"process_group": self._group, "no_dist": not self.sharded}
            dcp.save(tensors, checkpoint_id=scratch, storage_writer=writer, **options)
            if not self.world.is_main:
                return
            (scratch / "random.json").write_text(json.dumps(generators))
            (scratch / "state.json").write_text(json.dumps(asdict(at)))
            _seal(scratch)
            if final.exists():
                shutil.rmtree(final)
            os.replace(scratch, final)
            _sync(self.folder)
            # Those of a later step were damaged, or the run would have gone on from there; they count for nothing.
            known = _oldest_first(self.folder)
            here = known.index(final) + 1
            for gone in (*known[: max(0, here - self.keep)], *known[here:]):
                shutil.rmtree(gone)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            shutil.rmtree(scratch, ignore_errors=True)
            self._error = error


_METADATA = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    **dict.fromkeys(("pathlib", "pathlib._local"), ("Path", "PosixPath", "WindowsPath")),
}
"""What DCP's table of tensors is made of. `BytesStorageMetadata` is none of it: DCP runs what such an entry holds."""


class _Metadata(pickle.Unpickler):
    """Reads that table and refuses all else, which might be code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how the first Pythons 3.11 write an enum's member
            return lambda kind, member: kind[member]
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _METADATA.get(module, ()):
            raise ValueError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """Reads the files of a checkpoint at the same time, and runs nothing that they hold."""

    def read_metadata(self, *_: Any, **__: Any) -> Any:
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as handle:
                return _Metadata(handle).load()
        except ValueError as error:
            raise ValueError(f"{file} is refused: {error}; remove {file.parent} if you did not make it") from None

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)

        def read(items: list[ReadItem]) -> None:
            super(_Reader, self).read_data(replace(plan, items=items), planner).wait()

        with ThreadPoolExecutor(_MOST_THREADS) as pool:
            list(pool.map(read, by_file.values()))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _reason(error: BaseException) -> str:
    """What went wrong, in a line: of DCP's report the first process's error, and of that the system's own word on it,
    which torch.save covers with a complaint about its archive."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return " ".join(str(found or error).split())


def _threads(tensors: dict[str, Tensor]) -> int:
    """Files that a process writes at a time: one for small states, whose order of bytes then never changes."""
    size = sum(full.numel() * full.element_size() for t in tensors.values() for full in [_own(t)])
    return min(_MOST_THREADS, 1 + size // 2**30)


def _own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters and their moments by name; the tensors themselves, not copies."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"model.{name}"] = parameter.detach()
            found |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return found


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state before its first step, for a checkpoint to be read into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group.get("fused") else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def _copy(tensor: Tensor) -> Tensor:
    """On the CPU, and never the tensor itself, which training goes on to change."""
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().to("cpu")


def find_latest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and whole; a torn one is passed over, aloud."""
    for checkpoint in reversed(_oldest_first(folder)):
        problem = broken(checkpoint)
        if problem is None:
            return checkpoint
        print(f"checkpoint {checkpoint} is passed over: {problem}", flush=True)
    return None


def _oldest_first(folder: Path) -> list[Path]:
    """Checkpoints by their number, which has seven digits from a million steps on."""
    numbers = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return [folder / f"step-{number}" for number in sorted(filter(str.isdecimal, numbers), key=int)]


def broken(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return f"{MANIFEST} is missing or damaged"
    for name in manifest:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    found = _hashes([checkpoint / name for name in manifest])
    return next((f"{name} is damaged" for name in manifest if found[name] != manifest[name]), None)


def random_state() -> dict[str, Any]:
    """Of every generator that this process may draw from, as plain numbers."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), *map(float, rest)],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def _seal(folder: Path) -> None:
    """Writes the manifest (file to SHA-256) and syncs everything to the disk."""
    files = sorted(folder.iterdir())
    (folder / MANIFEST).write_text(json.dumps(_hashes(files), indent=1))
    for file in [*files, folder / MANIFEST]:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    _sync(folder)


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 by name; those of large files at the same time."""
    with ThreadPoolExecutor(_MOST_THREADS) as pool:
        return dict(zip((file.name for file in files), pool.map(_hash, files), strict=True))


def _hash(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Makes the folder's entries durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
