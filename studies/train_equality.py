"""One process, two under DDP and two under FSDP2: the same losses and gradient norms, over NCCL or gloo.

    torchrun --standalone --nproc-per-node 2 studies/train_equality.py --json out/same.json

A small model in float32, micro-batches with and without an image, accumulation, packing. The first process makes the
steps alone, then both make them together, in each way.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from train_full_size import TOY, keep, make_files

from vlmamba.training import build, launch
from vlmamba.training.config import RunConfig, from_mapping
from vlmamba.training.optimizer import set_rates
from vlmamba.training.parallel import Kind, World, joined

STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description="One process, DDP and FSDP2 compared.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, default=None, help="as for train_full_size.py")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--wait", action="store_true", help="begin at a line on stdin")
    options = parser.parse_args()
    if options.wait:
        sys.stdin.readline()
    with joined(options.device) as world, tempfile.TemporaryDirectory() as own:
        data = options.data or Path(world.from_main(lambda: own)) / "data"
        if options.data is None:
            world.from_main(lambda: make_files(data, 16, True))
        device = launch.pick_device(options.device, world)
        ways: list[Kind] = ["ddp", "fsdp"] if world.size > 1 else ["ddp"]
        found: dict[str, Any] = {"one": steps(recipe(data, options.device), device, World()) if world.is_main else []}
        for way in ways:
            found[f"{world.size} x {way}"] = steps(replace(recipe(data, options.device), parallel=way), device, world)
        if world.is_main:
            keep({"differences": differences(found), "loss_and_norm": found, "device": name(device)}, options.json)
        world.sum([0])


def recipe(data: Path, device: str) -> RunConfig:
    """A low rate: AdamW's first steps follow the sign of gradients, and so magnify their rounding."""
    parts = {part: {"lr": 1e-4} for part in ("connector", "language")}
    return from_mapping(
        RunConfig,
        {
            "output": str(data),
            "model": {
                "vision": TOY,
                "language": {"hidden_size": 128, "num_hidden_layers": 4, "state_size": 16, "vocab_size": 1024},
                "tokenizer": str(data / "tok"),
            },
            "data": [{"llava": {"file": str(data / "stage2.json"), "images": str(data)}}],
            "stage": parts,
            "optim": {
                "global_batch": 8, "micro_batch": 2, "max_steps": 100, "max_length": 512, "pack": True, "bf16": False,
            },
            "workers": 0,
            "device": device,
        },
    )  # fmt: skip


def steps(config: RunConfig, device: torch.device, world: World) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a fresh model."""
    launch.seed_all(config.seed)
    with build.quiet():
        model, processor = build.build(config.model, config.stage.image_mode)
    step = launch.make_step(model, processor, config, device, world)
    set_rates(step.optimizer, 1.0)
    feed = launch.make_feed(config, processor, device, world)
    batches = feed.batches()
    numbers = [step(next(batches)).read() for _ in range(STEPS)]
    feed.close()
    return numbers


def differences(found: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference from one process, over all steps, of loss and of gradient norm."""
    return {
        f"{way}, {what}": max(abs(a[i] - b[i]) / abs(a[i]) for a, b in zip(found["one"], numbers, strict=True))
        for way, numbers in found.items()
        for i, what in enumerate(("loss", "gradient norm"))
        if way != "one"
    }


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
