"""Times the CPU ops on one thread: our native and plain forms, and the loop of transformers' Mamba, in one run.

    python benchmarks/cpu_ops.py [--quick]

Prints CPU time in milliseconds, the best of several runs, so that a busy machine does not blur it. The loop is the one
that transformers' MambaMixer runs where no compiled kernel is installed, cut out of it from the step sizes to the gate:
what `selective_scan` does. Legend: B batch, L length, D channels, N states per channel.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

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
            times = [timed(form, shape, backward) for form in (native, plain, loop)]
            name = f"B{shape[0]} L{shape[1]} D{shape[2]}" + (" + backward" if backward else "")
            print(f"{name:24}" + "".join(f"{t:10.2f}" for t in times) + f"{times[2] / times[0]:16.1f}x")
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
    return tensors


def native(tensors: dict[str, Tensor]) -> Tensor:
    return ops.selective_scan(*(tensors[name] for name in NAMES), implementation="cpu")[0]


def plain(tensors: dict[str, Tensor]) -> Tensor:
    return ops.selective_scan(*(tensors[name] for name in NAMES), implementation="reference")[0]


def loop(tensors: dict[str, Tensor]) -> Tensor:
    """Channels first, decays and updates of all steps at once, one product a step: transformers' way."""
    x, dt, z = (tensors[name].transpose(1, 2) for name in ("x", "dt", "z"))
    dt = torch.nn.functional.softplus(dt + tensors["dt_bias"][:, None])
    decay = torch.exp(tensors["A"][None, :, None, :] * dt[..., None])
    update = dt[..., None] * tensors["B"][:, None].float() * x[..., None].float()
    state = torch.zeros(x.shape[0], x.shape[1], STATES)
    outputs = []
    for step in range(x.shape[2]):
        state = decay[:, :, step] * state + update[:, :, step]
        outputs.append(torch.matmul(state, tensors["C"][:, step, :, None])[..., 0])
    y = torch.stack(outputs, dim=-1) + x * tensors["D"][None, :, None]
    return (y * torch.nn.functional.silu(z)).transpose(1, 2)


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
            torch.autograd.grad(y, list(tensors.values()), gradient)
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
