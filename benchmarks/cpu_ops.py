"""Times the CPU ops on one thread: our native and plain forms, and the loop of transformers' Mamba, in one run.

    python benchmarks/cpu_ops.py [--quick]

Prints CPU time in milliseconds, the best of several runs, so that a busy machine does not blur it. The loop is what
transformers' Mamba runs where no compiled kernel is installed. Legend: B batch, L length, D channels, N states.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from vlmamba import ops

SHAPES = ((1, 256, 1536), (1, 600, 1536), (1, 1024, 5120), (4, 729, 1024))
STATES = 16
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two smaller shapes only")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(ops.explain("selective_scan", "cpu", torch.float32))
    print(f"first use: forward {first_use(False):.2f} s, backward {first_use(True):.2f} s (code generation)")
    print(f"{'selective scan, ms':24}{'native':>10}{'plain':>10}{'loop':>10}{'native to loop':>17}")
    for shape in SHAPES[: 2 if quick else None]:
        check(shape)
        for backward in (False, True):
            # Autograd through the loop fills a tensor of L x D x N at every step: minutes at the larger shapes.
            forms = (native, plain) if backward and shape != SHAPES[0] else (native, plain, loop)
            times = [timed(form, shape, backward) for form in forms]
            name = f"B{shape[0]} L{shape[1]} D{shape[2]}" + (" + backward" if backward else "")
            ratio = f"{times[2] / times[0]:16.1f}x" if len(times) == 3 else ""
            print(f"{name:24}" + "".join(f"{t:10.2f}" for t in times) + ratio)
    print(f"{'one token, us':24}{'native':>10}{'plain':>10}")
    for channels in (1536, 5120):
        times = [token(channels, implementation) for implementation in ("cpu", "reference")]
        print(f"{f'D{channels}':24}" + "".join(f"{t:10.1f}" for t in times))


def inputs(shape: tuple[int, int, int]) -> dict[str, Tensor]:
    batch, length, channels = shape
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "x": (batch, length, channels),
        "dt": (batch, length, channels),
        "A": (channels, STATES),
        "B": (batch, length, STATES),
        "C": (batch, length, STATES),
        "D": (channels,),
        "z": (batch, length, channels),
        "dt_bias": (channels,),
    }
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    tensors["A"] = -torch.arange(1, STATES + 1).float().expand(channels, -1).contiguous()
    tensors["dt_bias"] = tensors["dt_bias"] - 3
    tensors["x_channels_first"] = tensors["x"].transpose(1, 2).contiguous()
    return tensors


def native(tensors: dict[str, Tensor]) -> Tensor:
    return ops.selective_scan(*(tensors[name] for name in NAMES), implementation="cpu")[0]


def plain(tensors: dict[str, Tensor]) -> Tensor:
    return ops.selective_scan(*(tensors[name] for name in NAMES), implementation="reference")[0]


def loop(tensors: dict[str, Tensor]) -> Tensor:
    """transformers' own function, channels first, in the layouts its mixer hands over."""
    x = tensors["x_channels_first"]
    dt, B, C, z = (tensors[name].transpose(1, 2) for name in ("dt", "B", "C", "z"))
    y = mamba_selective_scan(
        x, dt, tensors["A"], B, C, tensors["D"], z, delta_bias=tensors["dt_bias"], delta_softplus=True
    )
    return y.transpose(1, 2)


def check(shape: tuple[int, int, int]) -> None:
    """No speed is reported of a wrong result."""
    tensors = inputs(shape)
    expected = loop(tensors)
    for form in (native, plain):
        error = ((form(tensors) - expected).norm() / expected.norm()).item()
        if not error < 1e-5:
            raise SystemExit(f"{form.__name__} is wrong at {shape}: relative error {error:.1e}")


def timed(form: Callable[[dict[str, Tensor]], Tensor], shape: tuple[int, int, int], backward: bool) -> float:
    """Best CPU milliseconds; of all the process's threads, as autograd runs backward on one of its own."""
    tensors = {name: tensor.requires_grad_(backward) for name, tensor in inputs(shape).items()}
    gradient = torch.ones(shape)
    best = math.inf
    spent = 0.0
    while spent < 3:
        start = time.process_time()
        y = form(tensors)
        if backward:
            torch.autograd.grad(y, list(tensors.values()), gradient, allow_unused=True)
        elapsed = time.process_time() - start
        best, spent = min(best, elapsed), spent + elapsed
    return 1e3 * best


def token(channels: int, implementation: str) -> float:
    """Best CPU microseconds of one convolution update and one state update at batch 1."""
    tensors = {name: tensor[:, 0] if tensor.dim() == 3 else tensor for name, tensor in inputs((1, 1, channels)).items()}
    state, window, weight = torch.zeros(1, channels, STATES), torch.zeros(1, 3, channels), torch.randn(channels, 4)
    best = math.inf
    with torch.inference_mode():
        for _ in range(20):
            start = time.process_time()
            for _ in range(50):
                x = ops.conv_update(window, tensors["x"], weight, activation="silu", implementation=implementation)
                rest = [tensors[name] for name in NAMES[1:]]
                ops.state_update(state, x, *rest, implementation=implementation)
            best = min(best, (time.process_time() - start) / 50)
    return 1e6 * best


def first_use(backward: bool) -> float:
    """Wall seconds of the first call in this process, most of it code generation."""
    tensors = {name: tensor.requires_grad_(backward) for name, tensor in inputs((1, 8, 64)).items()}
    start = time.perf_counter()
    y = native(tensors)
    if backward:
        y.sum().backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
