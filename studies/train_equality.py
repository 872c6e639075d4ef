"""One process, two under DDP and two under FSDP2: the same losses and gradient norms, over NCCL or gloo.

    torchrun --standalone --nproc-per-node 2 studies/train_equality.py --json out/same.json

A small model in float32, micro-batches with and without an image, accumulation, packing. The first process makes the
steps alone, then both make them together, in each way. Each says on stderr what it is about to do, and where it stands
if that takes longer than LIMIT.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from train_full_size import TOY, keep, machine, make_files

from vlmamba.training import build, launch
from vlmamba.training.config import RunConfig, from_mapping
from vlmamba.training.optimizer import set_rates
from vlmamba.training.parallel import Kind, World, joined

STEPS = 3
LENGTH = 256
"""Tokens of a row. Triton compiles a kernel anew where a count is 1 or a multiple of 16, and the scan saves its state
every 32 steps: rows of 64 to 480 tokens all get the same kernels."""
LIMIT = 85.0
"""Seconds after which a process says where it stands and ends."""


def main() -> None:
    parser = argparse.ArgumentParser(description="One process, DDP and FSDP2 compared.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", type=Path, default=None, help="as for train_full_size.py")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--wait", action="store_true", help="begin at a line on stdin")
    options = parser.parse_args()
    if options.wait:
        sys.stdin.readline()
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    began = time.monotonic()
    with joined(options.device) as world, tempfile.TemporaryDirectory() as own:

        def say(*what: str) -> None:
            text = ", ".join(what)
            print(f"{time.monotonic() - began:6.1f} s, process {world.rank}: {text}", file=sys.stderr, flush=True)

        say(f"one of {world.size}")
        data = options.data or Path(world.from_main(lambda: own)) / "data"
        if options.data is None:
            world.from_main(lambda: make_files(data, 16, True))
        found = compare(recipe(data, options.device), launch.pick_device(options.device, world), world, say)
        if world.is_main:
            keep(found, options.json)
        world.sum([0])
        say("done")
    faulthandler.cancel_dump_traceback_later()


def compare(config: RunConfig, device: torch.device, world: World, say: Callable[..., None]) -> dict[str, Any]:
    """The steps of one process, then of all in each way."""
    compile_kernels(config, device, world, say)
    found: dict[str, Any] = {}
    if world.is_main:
        found["one"] = steps(config, device, World(), partial(say, "alone"))
    say("waits for the others")
    world.sum([0])  # over gloo: nobody waits on a GPU for one that has not begun
    ways: list[Kind] = ["ddp", "fsdp"] if world.size > 1 else ["ddp"]
    for way in ways:
        name = f"{world.size} x {way}"
        found[name] = steps(replace(config, parallel=way), device, world, partial(say, name))
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    made = {"device": device_name, "commit": machine.commit(), "date": str(datetime.date.today())}
    return {"differences": differences(found) if world.is_main else {}, "loss_and_norm": found, **made}


def compile_kernels(config: RunConfig, device: torch.device, world: World, say: Callable[..., None]) -> None:
    """On a GPU: the first process compiles the language model's kernels while the last one compiles the connector's.
    All find them in Triton's cache from then on."""
    if device.type != "cuda":
        return
    with build.quiet():
        model, _ = build.build(config.model, config.stage.image_mode)
    model.to(device).train()
    if world.is_main:
        say("compiles the language model's kernels")
        ids = torch.zeros(2, LENGTH, dtype=torch.int64, device=device)
        model.language_model(input_ids=ids, labels=ids, seq_idx=ids.int(), use_cache=False).loss.backward()
        torch.cuda.synchronize(device)
    if world.rank == world.size - 1:
        say("compiles the connector's kernels")
        size = TOY["image_size"]
        model.get_image_features(torch.zeros(2, 3, size, size, device=device)).sum().backward()
        torch.cuda.synchronize(device)
    say("waits for the others' kernels")
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
                "language": {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 16, "vocab_size": 1280},
                "tokenizer": str(data / "tok"),
            },
            "data": [{"llava": {"file": str(data / "stage2.json"), "images": str(data)}}],
            "stage": parts,
            "optim": {
                "global_batch": 8, "micro_batch": 2, "max_steps": 100, "max_length": LENGTH, "pack": True,
                "bf16": False,
            },
            "workers": 0,
            "device": device,
        },
    )  # fmt: skip


def steps(config: RunConfig, device: torch.device, world: World, say: Callable[..., None]) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a fresh model."""
    launch.seed_all(config.seed)
    with build.quiet():
        model, processor = build.build(config.model, config.stage.image_mode)
    say("makes the step")
    step = launch.make_step(model, processor, config, device, world)
    set_rates(step.optimizer, 1.0)
    feed = launch.make_feed(config, processor, device, world)
    batches = feed.batches()
    numbers = []
    for number in range(1, STEPS + 1):
        say(f"step {number}")
        numbers.append(step(next(batches)).read())
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


if __name__ == "__main__":
    main()
