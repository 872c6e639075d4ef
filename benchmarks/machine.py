"""The machine: its name, and the two limits that every result is held against."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import peers
from benchmarks.timing import measure, rotating
from vlmamba import ops


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


def limits(device: torch.device, toy: bool) -> dict[str, float]:
    """Measured here and now: "copy", bytes a second read plus written by a large copy; "product", FLOP a second of an
    8192-cube bf16 product on random data (a smaller one on a CPU)."""
    on_gpu = device.type == "cuda"
    count = (2**20 if toy else 2**26) if not on_gpu else 2**30
    side = (128 if toy else 1024) if not on_gpu else 8192
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure(target.copy_, [(source,)], device=device, budget=0.5)
    pairs = rotating(
        lambda: tuple(torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2)), device, most=3
    )
    product = measure(torch.mm, pairs, device=device, budget=1.0)
    return {"copy": 2 * count / copy.median * 1e3, "product": 2 * side**3 / product.median * 1e3}
