"""The machine: its name, the two limits that every result is held against, and the commit that was measured on it."""

from __future__ import annotations

import itertools
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import peers
from benchmarks.timing import measure
from vlmamba import ops

ROOT = Path(__file__).parents[1]
# m, k, n of the products that a 2.8b model spends its time in: 16K tokens through in_proj and out_proj.
PRODUCTS = ((16384, 2560, 10240), (16384, 5120, 2560))
PRODUCTS_OF_A_CPU = ((1024, 1024, 1024),)
SUSTAINED = 1.5  # seconds: after one of these the clock has come down to what the card's power allows


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """What the report says of the machine and its software."""
    described: dict[str, Any] = {"name": name_of(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["device memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        described["L2"] = f"{properties.L2_cache_size / 2**20:.0f} MiB"
    else:
        described["cores"] = os.cpu_count()
    described["python"] = platform.python_version()
    described["torch"] = torch.__version__
    described["transformers"] = transformers.__version__
    try:
        import triton

        described["triton"] = triton.__version__
    except ImportError:
        described["triton"] = "not installed"
    described["vlmamba's ops"] = ops.explain("selective_scan", device, torch.float32)
    return described | {peer: version for peer, version in peers.versions().items() if peer != "transformers"}


def commit() -> str:
    """The commit of the code that runs, with "+changes" where tracked files differ from it (results apart). Without
    git, as in an unpacked archive, what the environment variable VLMAMBA_COMMIT says."""
    if _git("rev-parse", "--show-prefix") == "":  # "" at the top of a repository; None without one
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return f"{_git('rev-parse', '--short', 'HEAD')}{'+changes' if changes else ''}"
    return os.environ.get("VLMAMBA_COMMIT", "unknown")


def _git(*arguments: str) -> str | None:
    """What git says of the folder that this code lies in; None if it cannot say anything."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def limits(device: torch.device, toy: bool) -> dict[str, float]:
    """Measured here and now: "copy", bytes a second read plus written by a large copy; "product", `product_rate`."""
    on_gpu = device.type == "cuda"
    count = (2**20 if toy else 2**26) if not on_gpu else 2**30
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(target.copy_, [(source,)], device=device, budget=0.5)
    return {"copy": 2 * count / copy.median * 1e3, "product": product_rate(device, 0.05 if toy else SUSTAINED)}


def rate_is(device: torch.device) -> str:
    """What `product_rate` measures, for a report."""
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in _products(device))
    what = f"{shapes}: 16K tokens through in_proj and out_proj of 2.8b" if device.type == "cuda" else shapes
    return (
        f"products of random matrices ({what}) one after the other for {SUSTAINED} s, after {SUSTAINED} s of the same"
    )


def _products(device: torch.device) -> tuple[tuple[int, int, int], ...]:
    return PRODUCTS if device.type == "cuda" else PRODUCTS_OF_A_CPU


def product_rate(device: torch.device, seconds: float = SUSTAINED) -> float:
    """bf16 FLOP a second of PRODUCTS, one after the other for `seconds`, after as long a time of the same.

    A short measurement on a cold card would promise more than any training step can have: within a second the card
    reaches its power limit and lowers its clock.
    """
    shapes = _products(device)
    make = {"device": device, "dtype": torch.bfloat16}
    operands = [(torch.randn(m, k, **make), torch.randn(n, k, **make).t()) for m, k, n in shapes]
    work = sum(2.0 * m * k * n for m, k, n in shapes)
    for _ in range(2):  # the first time warms the card up
        rounds, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            for a, b in itertools.chain.from_iterable([operands] * 10):  # the device never waits for the host
                torch.mm(a, b)
            rounds += 10
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return work * rounds / passed
