"""The ops by themselves, beside mamba-ssm's and causal-conv1d's, each in the layout that it likes best.

Every time is that of a call inside a CUDA graph, over inputs that rotate through more memory than the cache. The
backward pass is the difference of a graph with it and a graph without it.

Shapes: B batch, L length, D channels, N states, K scan orders, P patches, W taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import models, peers
from benchmarks.bench import Bench
from benchmarks.gate import scan_inputs
from benchmarks.timing import Timing, measure, rotating
from vlmamba import ops

SCANS = ((16, 1024, 5120), (1, 1024, 5120), (1, 4096, 5120), (32, 1024, 1536), (4, 729, 2560), (1, 32768, 5120))
CONVOLUTIONS = ((16, 1024, 5120), (1, 1024, 5120))
TOKENS = (1, 8, 64, 256)

Case = tuple[int, int, int]


def run(bench: Bench) -> None:
    dtype = torch.float32 if bench.toy else torch.bfloat16
    if bench.part == "marks":
        for case in SCANS[:2]:
            _scan(bench, _small(bench, case), dtype)
        _grid(bench, dtype)
        return
    for case in SCANS[2:]:
        _scan(bench, _small(bench, case), dtype)
    for case in CONVOLUTIONS:
        _convolution(bench, _small(bench, case), dtype)
    _update(bench, dtype)


def _small(bench: Bench, case: Case) -> Case:
    return (min(case[0], 2), case[1] // 64, case[2] // 64) if bench.toy else case


def _no_peer(bench: Bench, peer: str) -> str | None:
    return peers.refusal(peer) or (None if bench.device.type == "cuda" else "its kernels need a GPU")


def _pair(
    bench: Bench,
    case: str,
    who: str,
    function: Callable[..., Any],
    inputs: list[tuple[Any, ...]],
    floor: float,
    together: bool = False,
) -> None:
    """Rows of the forward and the backward pass, and of both `together`; `floor` is the bytes of reading and writing
    everything once."""
    with bench.row_of(f"{case}, forward", who, "graph"):
        if bench.over(1):
            bench.missing(f"{case}, forward", who)
            return
        how: dict[str, Any] = {"device": bench.device, "graph": True, "budget": bench.seconds(0.3), "least": 7}
        with torch.no_grad():
            forward = measure(function, inputs, **how)
        bench.add(f"{case}, forward", who, "graph", forward, floor_bytes=floor)
        for tensors in inputs:
            for tensor in tensors:
                if isinstance(tensor, Tensor):
                    tensor.requires_grad_()

        def both(*tensors: Tensor) -> tuple[Tensor, ...]:
            y = function(*tensors)
            return torch.autograd.grad(y, [t for t in tensors if t.requires_grad], torch.ones_like(y))

        whole = measure(both, inputs, **how)
        low, high = whole.low - forward.median, whole.high - forward.median
        backward = Timing(whole.median - forward.median, low, high, whole.repeats)
        bench.add(f"{case}, backward", who, "graph", backward, floor_bytes=2 * floor)
        if together:
            bench.add(f"{case}, forward + backward", who, "graph", whole, floor_bytes=3 * floor)


def _scan(bench: Bench, shape: Case, dtype: torch.dtype) -> None:
    batch, length, channels = shape
    case = f"scan B{batch} D{channels} L{length}"
    item = torch.finfo(dtype).bits // 8
    floor = item * batch * length * (4 * channels + 32)  # x, dt, z, y; B and C

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        from mamba_ssm import selective_scan_fn

        return selective_scan_fn(x, dt, A, B, C, D, z, bias, delta_softplus=True)

    def turned() -> tuple[Tensor, ...]:
        inputs = scan_inputs(*shape, bench.device, dtype)
        return tuple(t.transpose(1, 2).contiguous() if t.ndim == 3 else t for t in inputs)

    sets = rotating(lambda: tuple(scan_inputs(*shape, bench.device, dtype)), bench.device, most=16)
    _pair(bench, case, models.OURS, lambda *a: ops.selective_scan(*a)[0], sets, floor)
    del sets
    bench.free()
    refusal = _no_peer(bench, "mamba-ssm")
    if refusal is not None:
        bench.missing(f"{case}, forward", models.MAMBA_SSM, refusal)
        return
    _pair(bench, case, models.MAMBA_SSM, theirs, rotating(turned, bench.device, most=16), floor)


def _grid(bench: Bench, dtype: torch.dtype) -> None:
    """Four orders over 27 x 27 patches, 8 images; the peer's four scans with the reordering that they need."""
    side, batch, channels = (27, 8, 5120) if not bench.toy else (3, 2, 64)
    count, K = side * side, len(ops.ORDERS)
    case = f"2-D scan B{batch}, {K} orders of {side} x {side}, D{channels}"
    item = torch.finfo(dtype).bits // 8
    floor = item * batch * count * (2 * K * channels + channels + 32 * K)

    def make() -> tuple[Tensor, ...]:
        _, _, A, _, _, D, _, bias = scan_inputs(1, 1, channels, bench.device, dtype)
        x, dt, B, C = (
            torch.randn(batch, K, count, n, device=bench.device, dtype=dtype) for n in (channels, channels, 16, 16)
        )
        return x, dt * 0.2, A, B, C, D, bias

    def ours(*a: Tensor) -> Tensor:
        return ops.scan_2d(*a, grid=(side, side), orders=ops.ORDERS)

    _pair(bench, case, models.OURS, ours, rotating(make, bench.device, most=3), floor, together=True)
    refusal = _no_peer(bench, "mamba-ssm")
    if refusal is not None:
        bench.missing(f"{case}, forward", models.MAMBA_SSM, refusal)
        return

    walk = torch.arange(count, device=bench.device)
    column = walk.view(side, side).t().reshape(-1)
    orders = [walk, walk.flip(0), column, column.flip(0)]
    inverses = [order.argsort() for order in orders]

    def four(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        from mamba_ssm import selective_scan_fn

        total = None
        for k, (order, inverse) in enumerate(zip(orders, inverses)):
            ordered = [t[:, k].index_select(1, order).transpose(1, 2).contiguous() for t in (x, dt, B, C)]
            y = selective_scan_fn(*ordered[:2], A, *ordered[2:], D, None, bias, delta_softplus=True)
            back = y.transpose(1, 2).index_select(1, inverse)
            total = back if total is None else total + back
        assert total is not None
        return total

    _pair(bench, case, models.MAMBA_SSM, four, rotating(make, bench.device, most=3), floor, together=True)


def _convolution(bench: Bench, shape: Case, dtype: torch.dtype) -> None:
    batch, length, channels = shape
    case = f"conv + SiLU B{batch} D{channels} L{length}"
    floor = 2.0 * torch.finfo(dtype).bits // 8 * batch * length * channels

    def make() -> tuple[Tensor, ...]:
        sizes = ((batch, length, channels), (channels, 4), (channels,))
        return tuple(torch.randn(size, device=bench.device, dtype=dtype) for size in sizes)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        from causal_conv1d import causal_conv1d_fn

        return causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.causal_conv1d(x, weight, bias, activation="silu")[0]

    _pair(bench, case, models.OURS, ours, rotating(make, bench.device, most=16), floor)
    refusal = _no_peer(bench, "causal-conv1d")
    if refusal is not None:
        bench.missing(f"{case}, forward", "causal-conv1d", refusal)
        return
    _pair(bench, case, "causal-conv1d", theirs, rotating(make, bench.device, most=16), floor)


def _update(bench: Bench, dtype: torch.dtype) -> None:
    """One token for all slots: the state is read and written once."""
    channels = 64 if bench.toy else 5120
    refusal = _no_peer(bench, "mamba-ssm")
    for batch in TOKENS[:1] if bench.toy else TOKENS:
        case = f"state update B{batch} D{channels}"

        def make(batch: int = batch) -> tuple[Tensor, ...]:
            x, dt, A, B, C, D, z, bias = scan_inputs(batch, 1, channels, bench.device, dtype)
            state = torch.randn(batch, channels, 16, device=bench.device)
            return state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], bias

        def theirs(*a: Tensor) -> Tensor:
            from mamba_ssm.ops.triton.selective_state_update import selective_state_update

            return selective_state_update(*a, dt_softplus=True)

        for who, function in ((models.OURS, ops.state_update), (models.MAMBA_SSM, theirs)):
            if who != models.OURS and refusal is not None:
                bench.missing(case, who, refusal)
                continue
            with bench.row_of(case, who, "graph"), torch.no_grad():
                sets = rotating(make, bench.device)
                timing = measure(function, sets, device=bench.device, graph=True, budget=bench.seconds(0.2), least=7)
                bench.add(case, who, "graph", timing, floor_bytes=8.0 * batch * channels * 16, batch=batch)
