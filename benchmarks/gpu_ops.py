"""Measure the GPU ops: a correctness gate against float64, then times beside the peers and the card's own limits.

    python benchmarks/gpu_ops.py --output ops.json [--quick] [--sweep]

Every time is the median over graph replays of calls that rotate over inputs larger than the second-level cache;
`spread` is the 10-90 % range. dt lies between 0.001 and 0.1, as in a trained model. A peer that cannot be imported is
shown as missing.

Letters: B batch, L length, D channels, N state size, K scan orders, P patches.
"""

# ruff: noqa: RUF005 (Triton has no starred tuples)

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl

from vlmamba.ops.causal_conv1d import triton as conv
from vlmamba.ops.scan_2d import triton as scan_2d
from vlmamba.ops.selective_scan import reference
from vlmamba.ops.selective_scan import triton as scan
from vlmamba.ops.state_update import triton as update

SHAPES = [(1, 5120, 1024), (1, 5120, 4096), (1, 5120, 32768), (16, 5120, 1024), (32, 1536, 1024), (4, 2560, 729)]
N = 16
CACHE = 128 << 20  # bytes that the rotating inputs exceed: twice the second-level cache of an H200
ORDERS = (0, 1, 2, 3)


def scan_inputs(
    B: int, D: int, L: int, dtype: torch.dtype = torch.bfloat16, K: int | None = None, seed: int = 0
) -> dict:
    """Inputs laid out as the layer has them: x and z halves of one tensor, B and C slices of another."""
    g = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=torch.float32).to(dtype)

    rows, own = ((B, L), ()) if K is None else ((B, K, L), (K,))
    low = randn(*rows, 160 + 2 * N)
    step = torch.exp(torch.rand(*own, D, generator=g, device="cuda") * 4.6 - 6.9)  # 0.001 to 0.1
    inputs = {
        "dt": randn(*rows, D) * 0.1,
        "A": -torch.arange(1, N + 1, device="cuda", dtype=torch.float32).repeat(*own, D, 1),
        "B": low[..., 160 : 160 + N],
        "C": low[..., 160 + N :],
        "D": torch.ones(*own, D, device="cuda"),
        "dt_bias": step + torch.log(-torch.expm1(-step)),
    }
    if K is None:
        xz = randn(B, L, 2 * D)
        return inputs | {"x": xz[..., :D], "z": xz[..., D:], "dy": randn(B, L, D)}
    return inputs | {"x": randn(B, K, L, D), "dy": randn(B, L, D)}


def arguments(t: dict) -> tuple:
    return (t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], t["z"], t["dt_bias"], True, None, None)


def rotation(make: Callable[[int], dict]) -> list[dict]:
    """Input sets, together larger than the cache."""
    first = make(0)
    size = sum(t.numel() * t.element_size() for t in first.values())
    return [first, *(make(seed) for seed in range(1, max(2, min(24, -(-CACHE // size)))))]


def measure(calls: list[Callable[[], object]], replays: int = 15) -> dict[str, float]:
    """Milliseconds of one call: all calls are captured in one graph, which is replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / len(calls))
    del graph
    low, *_, high = statistics.quantiles(times, n=10)
    return {"ms": statistics.median(times), "spread": high - low}


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


GATE = [(1, 5120, 1024, torch.bfloat16), (2, 1536, 333, torch.float32), (3, 200, 77, torch.float16)]


def gate(cases: list[tuple[int, int, int, torch.dtype]] = GATE) -> dict[str, float]:
    """Errors against float64 of outputs and gradients at sizes that use segments, several chunks and an odd length."""
    worst: dict[str, float] = {}
    for B, D, L, dtype in cases:
        t = scan_inputs(B, D, L, dtype)
        exact = {name: value.double() for name, value in t.items()}
        y, h, saved = scan.forward(*arguments(t), True)
        y64, h64, saved64 = reference.forward(*arguments(exact), True)
        found = (y, h, *scan.backward(t["dy"], h, *arguments(t), saved))
        expected = (y64, h64, *reference.backward(exact["dy"], h.double(), *arguments(exact), saved64))
        for name, a, b in zip(("y", "h", "dx", "ddt", "dA", "dB", "dC", "dD", "dz", "ddt_bias"), found, expected):
            worst[f"{str(dtype)[6:]} {name}"] = error(a, b)
        again = scan.backward(t["dy"], h, *arguments(t), scan.forward(*arguments(t), True)[2])
        repeats = all(torch.equal(a, b) for a, b in zip(found[2:10], again[:8]))
        worst[f"{str(dtype)[6:]} two runs differ"] = 0.0 if repeats else 1.0
    return worst


def passes(errors: dict[str, float]) -> bool:
    limit = {"float32": 1e-5, "bfloat16": 8e-3, "float16": 2e-3}
    return all(value < limit[name.split()[0]] for name, value in errors.items())


@triton.jit
def _exp2_kernel(out, rounds):
    lane = tl.arange(0, 128)
    values = ()
    for i in tl.static_range(16):
        values = values + (lane * -0.001 - i * 0.01,)
    for _ in range(rounds):
        after = ()
        for i in tl.static_range(16):
            after = after + (tl.exp2(values[i]),)
        values = after
    total = values[0]
    for i in tl.static_range(1, 16):
        total += values[i]
    tl.store(out + tl.program_id(0) * 128 + lane, total)


def limits() -> dict[str, float]:
    """Copy bandwidth (bytes read and written a second) and exp2 rate of this card in this run."""
    a = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    b = torch.empty_like(a)
    copy = measure([lambda: torch.neg(a, out=b)], 7)["ms"]  # a kernel: a graph hands a plain copy to the copy engine
    programs, rounds = torch.cuda.get_device_properties(0).multi_processor_count * 16, 2000
    out = torch.empty(programs * 128, device="cuda")
    exp2 = measure([lambda: _exp2_kernel[(programs,)](out, rounds, num_warps=4)], 7)["ms"]
    return {"copy TB/s": 2 * a.numel() * 2 / copy / 1e9, "exp2 T/s": programs * 128 * 16 * rounds / exp2 / 1e9}


def ours(shape: tuple[int, int, int]) -> dict[str, dict]:
    B, D, L = shape
    sets = rotation(lambda seed: scan_inputs(B, D, L, seed=seed))
    forward = measure([lambda t=t: scan.forward(*arguments(t), False) for t in sets])
    saved = [scan.forward(*arguments(t), False)[2] for t in sets]
    backward = measure([lambda t=t, s=s: scan.backward(t["dy"], None, *arguments(t), s) for t, s in zip(sets, saved)])
    return {"forward": forward, "backward": backward}


def peer(shape: tuple[int, int, int]) -> dict[str, dict] | str:
    """mamba-ssm's CUDA scan, on tensors in its own (B, D, L) layout; backward alone, through its autograd function."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as problem:
        return f"missing ({problem})"
    B, D, L = shape

    def turned(seed: int) -> dict:
        t = scan_inputs(B, D, L, seed=seed)
        for name in ("x", "dt", "B", "C", "z", "dy"):
            t[name] = t[name].transpose(1, 2).contiguous()
        return t

    sets = rotation(turned)

    def call(t: dict) -> torch.Tensor:
        return selective_scan_fn(t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], t["z"], t["dt_bias"], True)

    forward = measure([lambda t=t: call(t) for t in sets])
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    for t in sets:
        for name in names:
            t[name].requires_grad_()
    both = measure([lambda t=t: torch.autograd.grad(call(t), [t[n] for n in names], t["dy"]) for t in sets])
    return {"forward": forward, "backward": {"ms": both["ms"] - forward["ms"], "spread": both["spread"]}}


def two_dimensional() -> dict[str, dict]:
    """Four orders over 27 x 27 patches, 8 images, 5120 channels."""
    B, D, side = 8, 5120, 27
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    sets = rotation(lambda seed: scan_inputs(B, D, side * side, K=4, seed=seed))
    calls = [[t[name] for name in names] for t in sets]
    forward = measure([lambda a=a: scan_2d.scan_forward(*a, True, side, side, ORDERS) for a in calls])
    saved = [scan_2d.scan_forward(*a, True, side, side, ORDERS)[1] for a in calls]
    backward = measure([
        lambda a=a, t=t, s=s: scan_2d.scan_backward(t["dy"], *a, True, side, side, ORDERS, s)
        for a, t, s in zip(calls, sets, saved)
    ])  # fmt: skip
    x = torch.randn(B, side * side, D, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(B, 4, side * side, D, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(4, D, 4, device="cuda"), torch.randn(4, D, device="cuda")
    return {
        "forward": forward,
        "backward": backward,
        "conv forward": measure([lambda: scan_2d.conv_forward(x, weight, bias, "silu", side, side, ORDERS)]),
        "conv backward": measure([lambda: scan_2d.conv_backward(dy, x, weight, bias, "silu", side, side, ORDERS)]),
    }


def convolution() -> dict[str, dict]:
    result = {}
    for B, D, L in ((16, 5120, 1024), (1, 5120, 1024)):
        sets = rotation(lambda seed, B=B, D=D, L=L: scan_inputs(B, D, L, seed=seed))
        rest = (torch.randn(D, 4, device="cuda"), torch.randn(D, device="cuda"), "silu", None, None)
        shape = f"B{B} D{D} L{L}"
        result[f"forward {shape}"] = measure([lambda t=t, rest=rest: conv.forward(t["x"], *rest, False) for t in sets])
        result[f"backward {shape}"] = measure(
            [lambda t=t, rest=rest: conv.backward(t["dy"], None, t["x"], *rest) for t in sets]
        )
    return result


def one_token() -> dict[str, dict]:
    result = {}
    for B in (1, 8, 64, 256):
        sets = rotation(
            lambda seed, B=B: scan_inputs(B, 5120, 1, seed=seed) | {"state": torch.randn(B, 5120, N, device="cuda")}
        )
        slots = torch.randperm(B, device="cuda")
        result[f"state_update B{B}"] = measure([
            lambda t=t, slots=slots: update.forward(
                t["state"], t["x"][:, 0], t["dt"][:, 0], t["A"], t["B"][:, 0], t["C"][:, 0], t["D"], t["z"][:, 0],
                t["dt_bias"], True, slots,
            ) for t in sets
        ])  # fmt: skip
    return result


def sweep() -> dict[str, dict]:
    """The scan's constants, one at a time, at the two shapes of the marks. A setting that fails the gate is not
    timed."""
    constants = {
        "T": (2, 8), "T_BACK": (1, 4), "CHUNK": (32,), "REGISTERS": (128,), "REGISTERS_CUT": (168,),
        "ROUNDS": (2, 3, 5), "ROUNDS_BACK": (2, 4, 5), "ROUNDS_OUTPUT": (3, 5, 10),
    }  # fmt: skip
    chosen = {name: getattr(scan, name) for name in constants}
    result = {}
    trials = [{}, *({name: value} for name, values in constants.items() for value in values)]
    for trial in trials:
        for name, value in (chosen | trial).items():
            setattr(scan, name, value)
        label = ", ".join(f"{name} {value}" for name, value in trial.items()) or "as shipped"
        if not passes(gate(GATE[:1])):
            result[label] = {"gate": "red"}
            continue
        shapes = ((1, 5120, 1024),) if {"ROUNDS", "ROUNDS_BACK"} & set(trial) else ((16, 5120, 1024), (1, 5120, 1024))
        result[label] = {f"B{s[0]} {part}": times for s in shapes for part, times in ours(s).items()}
    for name, value in chosen.items():
        setattr(scan, name, value)
    return result


def resources() -> dict[str, list[dict]]:
    """Registers, spills and shared memory of every compiled form of the kernels."""
    found: dict[str, list[dict]] = {}
    for module in (scan, conv, update):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                for cache, *_ in kernel.device_caches.values():
                    found.setdefault(f"{module.__name__.split('.')[-2]}.{name}", []).extend(
                        {"registers": c.n_regs, "spills": c.n_spills, "shared": c.metadata.shared}
                        for c in cache.values()
                    )
    return found


def show(title: str, table: dict) -> None:
    def cell(value: object) -> str:
        return f"{value['ms']:.4f} ms (±{value['spread'] / 2:.4f})" if isinstance(value, dict) else str(value)

    print(f"\n{title}")
    for name, row in table.items():
        print(f"  {name:32s}", row if isinstance(row, str) else "   ".join(f"{k} {cell(v)}" for k, v in row.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="the two shapes of the marks only")
    parser.add_argument(
        "--sweep", action="store_true", help="also time the scan's constants, and the candidates for it"
    )
    args = parser.parse_args()
    begin = time.time()
    results: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    results["gate"] = gate()
    print("gate:", {name: f"{value:.1e}" for name, value in results["gate"].items()})
    if not passes(results["gate"]):
        print("RED: a result is wrong, so no time is reported")
        return 1
    results["limits"] = limits()
    print(results["device"], {name: round(value, 3) for name, value in results["limits"].items()})
    rate = results["limits"]["exp2 T/s"] * 1e9  # a millisecond
    results["scan"] = {}
    for shape in [(16, 5120, 1024), (1, 5120, 1024)] if args.quick else SHAPES:
        B, D, L = shape
        name = f"B{B} D{D} L{L}"
        results["scan"][name] = ours(shape) | {"exp2 limit": {"ms": B * D * L * N / rate, "spread": 0.0}}
        theirs = peer(shape)
        results["scan"][f"{name} mamba-ssm"] = theirs
    show("selective scan", results["scan"])
    results["other"] = {"scan_2d 4 orders B8 27x27 D5120": two_dimensional()}
    if not args.quick:
        results["other"] |= {"causal_conv1d": convolution(), "one token": one_token()}
    show("other ops", results["other"])
    if args.sweep:
        results["sweep"] = sweep()
        show("constants of the scan", results["sweep"])
    results["resources"] = resources()
    print("\nresources", json.dumps(results["resources"]))
    print(f"{time.time() - begin:.0f} s")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
