"""Checkpoints that are complete or not there: written aside, synced, hashed, renamed, and only then pointed at.

    checkpoints/step-000200/{model.safetensors, optimizer.pt, state.json, manifest.json}
    checkpoints/latest        the name of the newest one

Only trained parameters are kept: frozen ones are read from where the recipe says.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

MANIFEST = "manifest.json"
LATEST = "latest"


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


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, keep: int) -> Path:
    """Writes the complete state of a run and removes all but the newest `keep` checkpoints.

    Raises:
        CheckpointError: the disk is full, or the like.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{progress.step:06d}"
    scratch = folder / f".writing-{final.name}"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, scratch / "model.safetensors")
        torch.save({"optimizer": optimizer.state_dict(), "random": random_state()}, scratch / "optimizer.pt")
        (scratch / "state.json").write_text(json.dumps(asdict(progress)))
        _seal(scratch)
        if final.exists():
            shutil.rmtree(final)
        os.replace(scratch, final)
        _sync(folder)
        _point(folder, final.name)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(scratch, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written ({error}); earlier checkpoints are untouched") from error
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def find_latest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and whole; a torn one is passed over, aloud."""
    names = [p.name for p in sorted(folder.glob("step-*"), reverse=True)]
    for name in names:
        problem = broken(folder / name)
        if problem is None:
            return folder / name
        print(f"checkpoint {folder / name} is passed over: {problem}", flush=True)
    return None


def broken(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return f"{MANIFEST} is missing or damaged"
    for name, expected in manifest.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _hash(checkpoint / name) != expected:
            return f"{name} is damaged"
    return None


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Progress:
    """Puts the state of a run back: trained parameters, moments, random number generators."""
    tensors = load_file(checkpoint / "model.safetensors", device=str(device))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if tensors.keys() != trained.keys():
        odd = sorted(tensors.keys() ^ trained.keys())
        raise ValueError(f"{checkpoint} was made by another run: {odd[0]} and {len(odd) - 1} more differ")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    stored = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(stored["optimizer"])
    set_random_state(stored["random"])
    return Progress(**json.loads((checkpoint / "state.json").read_text()))


def random_state() -> dict[str, Any]:
    """Of every generator that a run may draw from, as plain tensors and numbers."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).copy()), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy(), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def _seal(folder: Path) -> None:
    """Writes the manifest (file to SHA-256) and syncs everything to the disk."""
    files = sorted(folder.iterdir())
    (folder / MANIFEST).write_text(json.dumps({file.name: _hash(file) for file in files}, indent=1))
    for file in [*files, folder / MANIFEST]:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    _sync(folder)


def _point(folder: Path, name: str) -> None:
    scratch = folder / f".{LATEST}"
    with scratch.open("w") as handle:
        handle.write(name)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(scratch, folder / LATEST)
    _sync(folder)


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
