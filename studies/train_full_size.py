"""Training steps at full size: real tokens a second, share of the product rate, peak memory, wait for data.

    python studies/train_full_size.py --stage 2 --json out/stage2.json
    torchrun --standalone --nproc-per-node 2 studies/train_full_size.py --stage 2 --parallel fsdp --json out/two.json
    torchrun --standalone --nproc-per-node 2 studies/train_full_size.py --size 7b --parallel fsdp --steps 10 --resume
    python studies/train_full_size.py --toy

Weights are random; everything else is as in the paper's stages: SigLIP-SO400M at 384 px, vss-l2 over bsm, the chat
templates, and image files (JPEG, 640 px) read, decoded and packed by loader processes through the real trainer's parts.
`--resume` saves a checkpoint after the steps, makes one more step, goes back to the checkpoint and makes it again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmamba.data.scenes.export import write
from vlmamba.training import build, launch
from vlmamba.training.checkpoint import Checkpoints, Progress
from vlmamba.training.config import RunConfig, TokenizerConfig, from_mapping
from vlmamba.training.estimate import _flops, _Memory, _parts
from vlmamba.training.optimizer import set_rates
from vlmamba.training.parallel import World, joined
from vlmamba.training.stages import learn_tokenizer
from vlmamba.training.step import Tally

SIZES = {"2.8b": (2560, 64), "7b": (4096, 64), "1.4b": (2048, 48), "toy": (32, 2)}
SIGLIP = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip
TOY = SIGLIP | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
}  # fmt: skip
SKIP = 2
"""Steps before the clock runs: compilation, allocation, workers."""


def main() -> None:
    options = parse()
    with joined(options.device) as world, tempfile.TemporaryDirectory() as own:
        folder = Path(world.from_main(lambda: own))
        world.from_main(lambda: make_files(folder, options))
        device = launch.pick_device(options.device, world)
        config = recipe(folder, options)
        found = measure(config, device, world, options)
        if world.is_main:
            text = json.dumps(found, indent=1)
            print(text)
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(text)
        world.sum([0])  # the files are removed when all are done


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps at full size.")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2))
    parser.add_argument("--size", default="2.8b", choices=SIZES)
    parser.add_argument("--steps", type=int, default=12, help="steps, of which the first two are not timed")
    parser.add_argument("--global-batch", type=int, default=None, help="default: the paper's, 256 and 128")
    parser.add_argument("--micro-batch", type=int, default=16, help="samples")
    parser.add_argument("--pack-into", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--keep-activations", action="store_true", help="no activation checkpointing")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp"))
    parser.add_argument("--images", type=int, default=512, help="image files that are made and read")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--toy", action="store_true", help="a few thousand parameters, to see that all of it runs")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    if options.toy:
        options.size, options.images, options.workers, options.steps = "toy", 8, 0, min(options.steps, 4)
        options.global_batch, options.micro_batch, options.pack_into = 4, 2, 1024
    return options


def make_files(folder: Path, options: argparse.Namespace) -> None:
    """A LLaVA JSON with JPEG files, and a tokenizer."""
    write(
        folder / "data",
        f"llava-stage{options.stage}",
        options.images,
        0,
        size=56 if options.toy else 640,
        progress=False,
    )
    (file,) = (folder / "data").glob("*.json")
    file.write_text(file.read_text().replace(".png", ".jpg"))
    for picture in (folder / "data").rglob("*.png"):
        Image.open(picture).convert("RGB").save(picture.with_suffix(".jpg"), quality=90)
        picture.unlink()
    learn_tokenizer(
        from_mapping(TokenizerConfig, {"scenes": {"seed": 1, "what": "text"}, "samples": 200}), folder / "tok"
    )


def recipe(folder: Path, options: argparse.Namespace) -> RunConfig:
    """The paper's stage, with fresh parts of the size asked for."""
    width, layers = SIZES[options.size]
    (file,) = (folder / "data").glob("*.json")
    rates = {"connector": {"lr": 1e-3}} if options.stage == 1 else {p: {"lr": 2e-5} for p in ("connector", "language")}
    template, image_mode = ("plain", "crop") if options.stage == 1 else ("v1", "pad")
    forms = {"template": template, "image_mode": image_mode}
    return from_mapping(
        RunConfig,
        {
            "output": str(folder / "run"),
            "model": {
                "vision": TOY if options.toy else SIGLIP,
                "language": {
                    "hidden_size": width, "num_hidden_layers": layers, "state_size": 16, "residual_in_fp32": True,
                    "vocab_size": 1024 if options.toy else 50280,
                },
                "tokenizer": str(folder / "tok"),
            },
            "data": [{"llava": {"file": str(file), "images": str(folder / "data")}}],
            "stage": rates | forms,
            "optim": {
                "global_batch": options.global_batch or (256 if options.stage == 1 else 128),
                "micro_batch": options.micro_batch,
                "max_steps": 10_000,
                "max_length": min(2048, options.pack_into),
                "pack": True,
                "pack_into": options.pack_into,
                "checkpoint_activations": not options.keep_activations,
                "compile": options.compile,
            },
            "workers": options.workers,
            "device": options.device,
            "parallel": options.parallel,
        },
    )  # fmt: skip


def measure(config: RunConfig, device: torch.device, world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Times the steps and gathers the numbers of the main process."""
    rate = product_rate(device)
    launch.seed_all(config.seed)
    with build.quiet(), torch.device(device):  # fresh weights are drawn where they are drawn fastest
        model, processor = build.build(config.model, config.stage.image_mode)
    parts = _parts_of(model, config)
    step = launch.make_step(model, processor, config, device, world)
    set_rates(step.optimizer, 1.0)
    feed = launch.make_feed(config, processor, device, world)
    batches = feed.batches()
    waits, results, rows = [], [], (0, 0)
    started = time.perf_counter()
    for number in range(options.steps):
        if number == SKIP:
            synchronize(device)
            world.sum([0])
            started = time.perf_counter()
        before = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - before
        result = step(micro_batches)
        rows = max([rows, *((b.input_ids.numel(), 0 if b.pixels is None else len(b.pixels)) for b in micro_batches)])
        if number >= SKIP:
            waits.append(waited)
            results.append(result)
    synchronize(device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    numbers = [result.read() for result in results]
    found = report(config, parts, step, results, seconds, waits, rate, world)
    counted = _Memory(model, config, device.type, world.size)
    counted.sizes = {name: (p.numel(), p.requires_grad, p.ndim) for name, p in model.named_parameters()}
    found |= {
        "what": vars(options) | {"json": None},
        "peak_gib": peak,
        "estimated_peak_gib": counted.peak(*rows)["peak"] / 2**30,
        "largest_micro_batch": {"tokens": rows[0], "images": rows[1]},
        "losses": [round(loss, 5) for loss, _ in numbers],
        "data": feed.describe(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    if options.resume:
        found["resume"] = resume(config, step, batches, world)
    feed.close()
    return found


def _parts_of(model: Any, config: RunConfig) -> Any:
    launch.freeze(model, config.stage)
    return _parts(model, config)


def report(
    config: RunConfig, parts: Any, step: Any, results: list[Any], seconds: float, waits: list[float], rate: float,
    world: World,
) -> dict[str, Any]:  # fmt: skip
    """Model arithmetic only: what is computed a second time for the backward pass does not count."""
    tallies: list[Tally] = [result.tally for result in results]
    tokens, images = sum(t.tokens for t in tallies), sum(t.images for t in tallies)
    plain = replace(config, optim=replace(config.optim, checkpoint_activations=False))
    # Of one token and of the patches of one image: the sample's count is linear in both.
    patches = step.model.vision_tower.num_tokens
    language = _flops([p for p in parts if p.name == "language"], plain, 0) / _tokens_of(plain)
    rest = _flops([p for p in parts if p.name != "language"], plain, patches)
    if config.stage.language.lr == 0:
        language *= 2  # gradients pass through the frozen language model to the connector
    flops = tokens * language + images * rest
    return {
        "parameters_billions": {p.name: p.parameters / 1e9 for p in parts},
        "step_seconds": seconds / len(results),
        "tokens_per_second": tokens / seconds,
        "images_per_second": images / seconds,
        "padding": 1 - tokens / sum(t.slots for t in tallies),
        "data_wait": sum(waits) / seconds,
        "data_wait_longest_s": max(waits),
        "tflops_per_device": flops / seconds / world.size / 1e12,
        "product_rate_tflops": rate / 1e12,
        "share_of_product_rate": flops / seconds / world.size / rate,
        "processes": world.size,
    }


def _tokens_of(config: RunConfig) -> int:
    from vlmamba.training.estimate import _TEXT

    return min(config.optim.max_length, _TEXT[config.stage.template])


def resume(config: RunConfig, step: Any, batches: Any, world: World) -> dict[str, Any]:
    """Saves, makes a step, goes back, makes it again."""
    checkpoints = Checkpoints(Path(config.output) / "checkpoints", 1, world, step.parallel.sharded)
    synchronize(step.device)
    started = time.perf_counter()
    checkpoints.save(step.model, step.optimizer, Progress(step=1))
    copied = time.perf_counter() - started
    batch = next(batches)
    first = step(batch).read()
    checkpoints.wait()
    world.sum([0])
    written = time.perf_counter() - started
    started = time.perf_counter()
    assert checkpoints.load(step.model, step.optimizer) is not None
    loaded = time.perf_counter() - started
    set_rates(step.optimizer, 1.0)
    second = step(batch).read()
    files = [f for f in (Path(config.output) / "checkpoints").rglob("*") if f.is_file()]
    return {
        "stopped_s": copied, "written_s": written, "loaded_s": loaded,
        "gigabytes": sum(map(os.path.getsize, files)) / 1e9,
        "loss_and_norm": first, "again": second, "same": first == second,
    }  # fmt: skip


def product_rate(device: torch.device) -> float:
    """FLOP/s of square products, 8192 in bf16 on a GPU, 512 in float32 on a CPU; the median of several."""
    side, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(12):
        synchronize(device)
        started = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
