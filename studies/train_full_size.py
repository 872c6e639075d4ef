"""Training steps at full size: real tokens a second, share of the product rate, peak memory, wait for data.

    python studies/train_full_size.py --stage 2 --json out/stage2.json
    torchrun --standalone --nproc-per-node 2 studies/train_full_size.py --stage 2 --parallel fsdp --json out/two.json
    python studies/train_full_size.py --toy

(`studies/train_on_gpus.py` runs all rows of a machine's table.) Weights are random; everything else is as in the
paper's stages: SigLIP-SO400M at 384 px, vss-l2 over bsm, the chat templates, and image files (JPEG, 640 px) read,
decoded and packed by loader processes through the real trainer's parts. `--resume` saves a checkpoint after the steps,
makes one more step, goes back to the checkpoint and makes it again. `--profile FILE` takes one step more apart into the
kernels that it spent most time in.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import machine
from vlmamba.data.collate import Batch
from vlmamba.data.processes import in_parallel
from vlmamba.data.scenes.export import write
from vlmamba.training import build, launch
from vlmamba.training.checkpoint import Checkpoints, Progress
from vlmamba.training.config import RunConfig, TokenizerConfig, from_mapping
from vlmamba.training.estimate import estimate
from vlmamba.training.optimizer import part_of, set_rates
from vlmamba.training.parallel import World, joined
from vlmamba.training.stages import learn_tokenizer
from vlmamba.training.step import Step, Tally

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
LARGEST = 40
"""Kernels that a profile names."""


def main() -> None:
    options = parse()
    if options.wait:  # everything is imported: the next row of a table begins as soon as the one before is done
        sys.stdin.readline()
    with joined(options.device) as world, folders(options, world) as (data, scratch):
        device = launch.pick_device(options.device, world)
        found = measure(recipe(data, scratch, options), device, world, options)
        if world.is_main:
            keep(found, options.json)
        world.sum([0])  # the files are removed when all are done


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps at full size.")
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2))
    parser.add_argument("--size", default="2.8b", choices=SIZES)
    parser.add_argument("--steps", type=int, default=7, help="steps, of which the first two are not timed")
    parser.add_argument("--micro-batch", type=int, default=16, help="samples; 16 fill two rows of 8192 tokens")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step on each device")
    parser.add_argument("--pack-into", type=int, default=8192, help="tokens of a row")
    parser.add_argument(
        "--recompute", type=float, default=0.0, help="share of the blocks under activation checkpointing"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--parallel", default="ddp", choices=("ddp", "fsdp"))
    parser.add_argument("--images", type=int, default=384, help="image files that are made and read")
    parser.add_argument("--data", type=Path, default=None, help="where files made before lie; default: they are made")
    parser.add_argument("--scratch", type=Path, default=None, help="where checkpoints go; default: a temporary folder")
    parser.add_argument("--workers", type=int, default=8, help="loader processes of each device")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--profile", type=Path, default=None, help="a JSON file: the largest kernels of one more step")
    parser.add_argument("--toy", action="store_true", help="a few thousand parameters, to see that all of it runs")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--wait", action="store_true", help="begin at a line on stdin")
    options = parser.parse_args()
    if options.toy:
        options.size, options.images, options.workers, options.steps = "toy", 8, 0, min(options.steps, 4)
        options.micro_batch, options.pack_into = 2, 1024
    return options


@contextmanager
def folders(options: argparse.Namespace, world: World) -> Iterator[tuple[Path, Path]]:
    """The data, made unless they are there, and a folder for what a run writes, which goes away."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as own:
        scratch = Path(world.from_main(lambda: own))
        data = options.data or scratch / "data"
        if options.data is None:
            world.from_main(lambda: make_files(data, options.images, options.toy))
        yield data, scratch


def make_files(folder: Path, images: int, toy: bool) -> None:
    """LLaVA JSON with JPEG files for both stages, `stage1.json` and `stage2.json`, and a tokenizer, `tok`."""
    folder.mkdir(parents=True)
    each = 8 if toy else 32
    chunks = [
        (folder / f"stage{stage}-{k}", stage, min(each, images - first), k, 56 if toy else 640)
        for stage in (1, 2)
        for k, first in enumerate(range(0, images, each))
    ]
    entries: dict[int, list[Any]] = {1: [], 2: []}
    for chunk, made in zip(chunks, in_parallel(_draw, chunks, "drawing"), strict=True):
        entries[chunk[1]] += made
    for stage, of in entries.items():
        (folder / f"stage{stage}.json").write_text(json.dumps(of))
    learn_tokenizer(
        from_mapping(TokenizerConfig, {"scenes": {"seed": 1, "what": "text"}, "samples": 200}), folder / "tok"
    )


def _draw(chunk: tuple[Path, int, int, int, int]) -> list[Any]:
    """Some pictures of a stage, as JPEG files; their entries, with paths from the folder above."""
    folder, stage, count, seed, size = chunk
    write(folder, f"llava-stage{stage}", count, seed, size=size, progress=False)
    for picture in folder.rglob("*.png"):
        Image.open(picture).convert("RGB").save(picture.with_suffix(".jpg"), quality=90)
        picture.unlink()
    (file,) = folder.glob("*.json")
    entries = json.loads(file.read_text())
    for entry in entries:
        if "image" in entry:
            entry["image"] = f"{folder.name}/{Path(entry['image']).with_suffix('.jpg')}"
    return entries


def recipe(data: Path, scratch: Path, options: argparse.Namespace) -> RunConfig:
    """The paper's stage, with fresh parts of the size asked for."""
    width, layers = SIZES[options.size]
    rates = {"connector": {"lr": 1e-3}} if options.stage == 1 else {p: {"lr": 2e-5} for p in ("connector", "language")}
    template, image_mode = ("plain", "crop") if options.stage == 1 else ("v1", "pad")
    forms = {"template": template, "image_mode": image_mode}
    return from_mapping(
        RunConfig,
        {
            "output": str(scratch / "run"),
            "model": {
                "vision": TOY if options.toy else SIGLIP,
                "language": {
                    "hidden_size": width, "num_hidden_layers": layers, "state_size": 16, "residual_in_fp32": True,
                    "vocab_size": 1280 if options.toy else 50280,
                },
                "tokenizer": str(data / "tok"),
            },
            "data": [{"llava": {"file": str(data / f"stage{options.stage}.json"), "images": str(data)}}],
            "stage": rates | forms,
            "optim": {
                "global_batch": options.micro_batch * options.accumulate * int(os.environ.get("WORLD_SIZE", "1")),
                "micro_batch": options.micro_batch,
                "max_steps": 10_000,
                "max_length": min(2048, options.pack_into),
                "pack": True,
                "pack_into": options.pack_into,
                "checkpoint_activations": options.recompute,
                "compile": options.compile,
            },
            "workers": options.workers,
            "device": options.device,
            "parallel": options.parallel,
        },
    )  # fmt: skip


def measure(config: RunConfig, device: torch.device, world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Times the steps and gathers the numbers of the main process."""
    began = time.perf_counter()
    rate = machine.product_rate(device, 0.1 if options.toy else machine.SUSTAINED)
    step, feed, patches = prepared(config, device, world)
    per_token, per_patch = arithmetic(step.model)
    batches = feed.batches()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ready = time.perf_counter() - began
    results, waits, times, largest = timed(step, batches, options.steps, device, world)
    tallies: list[Tally] = [result.tally for result in results]
    tokens, images, seconds = sum(t.tokens for t in tallies), sum(t.images for t in tallies), sum(times)
    flops = tokens * per_token + images * patches * per_patch
    # What --dry-run says of this recipe, before anything loads.
    predicted = estimate(config, device.type, world.size)
    found = {
        "what": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "processes": world.size,
        "tokens_per_second": tokens / seconds,
        "images_per_second": images / seconds,
        "step_ms": [round(1e3 * t, 2) for t in times],
        "tokens_of_a_step": [t.tokens for t in tallies],
        "padding": 1 - tokens / sum(t.slots for t in tallies),
        "data_wait": sum(waits) / seconds,
        "data_wait_longest_s": max(waits),
        "tflops_per_device": flops / seconds / world.size / 1e12,
        "product_rate_tflops": rate / 1e12,
        "product_rate_is": machine.rate_is(device),
        "share_of_product_rate": flops / seconds / world.size / rate,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "dry_run_gib": predicted.memory["peak"] / 2**30,
        "dry_run_micro_batch": [predicted.rows * predicted.length, predicted.images],
        "largest_micro_batch": largest,
        "losses": [round(result.read()[0], 5) for result in results],
        "billions": {part.name: [part.parameters / 1e9, part.trained / 1e9] for part in predicted.parts},
        "data": feed.describe(),
        "seconds_until_ready": ready,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "commit": machine.commit(),
        "date": str(datetime.date.today()),
    }  # fmt: skip
    if world.is_main and (options.profile or options.resume):
        keep(found, options.json)  # in case that what follows fails
    if options.profile:
        kernels = profile(step, next(batches), device)
        if world.is_main:
            keep(kernels, options.profile)
    if options.resume:
        found["resume"] = resume(config, step, batches, world)
    feed.close()
    return found


def prepared(config: RunConfig, device: torch.device, world: World) -> tuple[Step, Any, int]:
    """The step and the feed of a fresh model, and the tokens of an image."""
    launch.seed_all(config.seed)
    with build.quiet(), torch.device(device):  # weights are drawn where that is fastest
        model, processor = build.build(config.model, config.stage.image_mode)
    step = launch.make_step(model, processor, config, device, world)
    set_rates(step.optimizer, 1.0)
    return step, launch.make_feed(config, processor, device, world), model.vision_tower.num_tokens


def timed(
    step: Step, batches: Iterator[list[Batch]], steps: int, device: torch.device, world: World
) -> tuple[list[Any], list[float], list[float], tuple[int, int]]:
    """Results, waits for data and seconds of the steps after the first ones, and the largest micro-batch.

    The host runs ahead, as in training: a GPU's own clock stands at the end of every step.
    """
    waits, results, marks, largest = [], [], [], (0, 0)
    for number in range(steps):
        if number == SKIP:
            world.sum([0])
            marks.append(_mark(device))
        before = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - before
        result = step(micro_batches)
        sizes = ((b.input_ids.numel(), 0 if b.pixels is None else len(b.pixels)) for b in micro_batches)
        largest = max([largest, *sizes])
        if number >= SKIP:
            marks.append(_mark(device))
            waits.append(waited)
            results.append(result)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        times = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    else:
        times = [b - a for a, b in pairwise(marks)]
    return results, waits, times, largest


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def arithmetic(model: torch.nn.Module) -> tuple[float, float]:
    """FLOP of a token in the language model, and of a patch in encoder and connector.

    Two a parameter forward; two more where gradients pass through to what learns before it; two more for the gradients
    of parameters that learn. So 6 for what is trained, 4 for a frozen language model behind a connector that learns, 2
    for a frozen encoder. What is computed a second time does not count, nor do convolution and scan.
    """
    sizes: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        size = sizes.setdefault(part_of(name), [0, 0])
        size[0] += parameter.numel()
        size[1] += parameter.numel() * parameter.requires_grad
    learning = [part for part, (_, trained) in sizes.items() if trained]
    flops = {}
    for part, (count, trained) in sizes.items():
        passed = trained > 0 or (part == "language" and bool(learning))
        flops[part] = 2.0 * count + 2.0 * count * passed + 2.0 * trained
    return flops.pop("language"), sum(flops.values())


def resume(config: RunConfig, step: Step, batches: Any, world: World) -> dict[str, Any]:
    """Saves, makes a step, goes back, makes it again."""
    folder = Path(config.output) / "checkpoints"
    checkpoints = Checkpoints(folder, 1, world, step.parallel.sharded)
    _finish(step.device)
    started = time.perf_counter()
    checkpoints.save(step.model, step.optimizer, Progress(step=1))
    copied = time.perf_counter() - started
    batch = next(batches)
    first = step(batch).read()
    checkpoints.wait()
    world.sum([0])
    written = time.perf_counter() - started
    started = time.perf_counter()
    if checkpoints.load(step.model, step.optimizer) is None:
        raise RuntimeError(f"the checkpoint in {folder} is not whole")
    loaded = time.perf_counter() - started
    set_rates(step.optimizer, 1.0)
    second = step(batch).read()
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return {
        "copied_s": copied, "written_s": written, "loaded_s": loaded, "gigabytes": size / 1e9, "where": str(folder),
        "loss_and_norm": first, "again": second, "same_loss": first[0] == second[0],
        "norm_differs_by": abs(first[1] - second[1]) / first[1],
    }  # fmt: skip


def profile(step: Step, micro_batches: list[Batch], device: torch.device) -> dict[str, Any]:
    """The kernels of a step (on a CPU: torch's operators) by their time, the largest first, and the time of all."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    _finish(device)
    with torch.profiler.profile(activities=[activity]) as profiler:
        began = time.perf_counter()
        step(micro_batches).read()
        _finish(device)
        took = time.perf_counter() - began
    # Of a CUDA trace also the calls of its runtime are events, of the host.
    times = [
        (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count, event.key)
        for event in profiler.key_averages()
        if (event.device_type == torch.autograd.DeviceType.CUDA) == on_gpu
    ]
    times.sort(reverse=True)
    return {
        "step_ms": 1e3 * took,
        "all_ms": sum(spent for spent, _, _ in times) / 1e3,
        "tokens": sum(batch.num_tokens for batch in micro_batches),
        "kernels": [{"ms": spent / 1e3, "calls": calls, "name": name} for spent, calls, name in times[:LARGEST]],
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep(found: dict[str, Any], file: Path | None) -> None:
    text = json.dumps(found, indent=1)
    print(text, flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(".writing")
        scratch.write_text(text)
        shutil.move(scratch, file)


if __name__ == "__main__":
    main()
