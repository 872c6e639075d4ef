"""The selective scan in native code on the CPU: float32 inside, bfloat16 and float16 converted at the door.

A row is one sequence, or one order of one image; `scan_rows` serves both. Rows, and ranges of channels within a row,
are shared out among threads.

Legend: B batch, K scan orders (1 for a plain sequence), L length, D channels, N states per channel, M blocks of lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmamba.ops import native
from vlmamba.ops.emit import LOG2E
from vlmamba.ops.rows import (
    KEPT,
    Cut,
    Extent,
    extents,
    new_rows,
    orders_of,
    place,
    readable,
    start_table,
    straight,
)
from vlmamba.ops.selective_scan import kernels
from vlmamba.ops.selective_scan.kernels import Arg


def saved_shape(batch: int, length: int, channels: int, states: int, orders: int = 1) -> tuple[int, ...]:
    """Shape of the third output of `forward`: the state at every `KEPT`-th step, in blocks of lanes."""
    lanes = native.host().lanes
    return (batch, orders, -(-length // KEPT), -(-channels // lanes), states, lanes)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, initial_state: Tensor | None, seq_idx: Tensor | None, return_final_state: bool,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y (B, L, D) in x's dtype, the final state (B, D, N) or an empty tensor, and the kept states (none without
    `save`)."""
    rows = _one_order(x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx)
    y, state, saved = scan_rows(rows, None if initial_state is None else initial_state[:, None], save)
    final = rows.cut.whole(state)[:, 0] if return_final_state else state.new_empty(0)
    return y[:, 0].to(x.dtype), final, saved


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, seq_idx: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (x, dt, A, B, C, D, z, dt_bias, initial_state), None for what was not given."""
    rows = _one_order(x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx)
    dfinal = None if dfinal_state is None else dfinal_state[:, None]
    found = scan_rows_backward(rows, dy[:, None], dfinal, saved)
    dx, ddt, dB, dC = (
        gradient[:, 0].to(t.dtype) for gradient, t in zip((found.x, found.dt, found.B, found.C), (x, dt, B, C))
    )
    return (
        dx,
        ddt,
        found.A[0].to(A.dtype),
        dB,
        dC,
        None if D is None else found.D[0].to(D.dtype),
        None if z is None or found.z is None else found.z[:, 0].to(z.dtype),
        None if dt_bias is None else found.dt_bias[0].to(dt_bias.dtype),
        None if initial_state is None else found.state[:, 0].to(initial_state.dtype),
    )


@dataclass(frozen=True)
class Rows:
    """What B x K scans read. Order k of every batch element visits position walks[k][t] at step t."""

    x: Tensor  # (B, K, L, D), as is dt; B, C (B, K, L, N)
    dt: Tensor
    z: Tensor | None  # (B, 1, L, D)
    B: Tensor
    C: Tensor
    A: Tensor  # (K, M, N, lanes), times log2(e)
    D: Tensor  # (K, M, lanes), as is dt_bias
    dt_bias: Tensor
    dt_softplus: bool
    cut: Cut
    walks: Sequence[np.ndarray]
    extents: Sequence[Extent]  # of every batch element

    @property
    def threads(self) -> int:
        return native.threads_for(self.x[..., 0].numel() * self.A[0].numel())

    def shares(self) -> list[range]:
        """The blocks of channels that one task takes of a row."""
        return self.cut.shares(self.x.shape[0] * self.x.shape[1], self.threads)

    def table(self, b: int, k: int, chunks: np.ndarray) -> list[int]:
        """The arguments that forward and backward share."""
        table = start_table(kernels.ARGUMENTS, self.cut, chunks, self.walks[k])
        for arg, tensor in ((Arg.X, self.x), (Arg.DT, self.dt), (Arg.Z, self.z), (Arg.B, self.B), (Arg.C, self.C)):
            if tensor is not None:
                place(table, arg, tensor[b, k])
        for arg, tensor in ((Arg.A, self.A), (Arg.D, self.D), (Arg.BIAS, self.dt_bias)):
            table[arg] = tensor[k].data_ptr()
        table[Arg.SOFTPLUS] = int(self.dt_softplus)
        table[Arg.KEPT_STRIDE] = self.A[0].numel() * 4
        return table

    def start(self, state: Tensor | None) -> Tensor:
        """A fresh copy (B, K, M, N, lanes) of the states (B, K, D, N) to start from; zeros for None."""
        return torch.zeros(self.x.shape[0], *self.A.shape) if state is None else self.cut.blocked(state)


@dataclass(frozen=True)
class RowGradients:
    """Gradients of what `Rows` reads; those of A, D, dt_bias are summed over the batch."""

    x: Tensor
    dt: Tensor
    z: Tensor | None
    B: Tensor
    C: Tensor
    A: Tensor  # (K, D, N)
    D: Tensor  # (K, D)
    dt_bias: Tensor
    state: Tensor  # (B, K, D, N)


def scan_rows(rows: Rows, initial_state: Tensor | None, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y (B, K, L, D), the final states (B, K, M, N, lanes), and the kept states (none without `save`)."""
    batch, orders, length, channels = rows.x.shape
    states = rows.A.shape[2]
    state = rows.start(initial_state)
    saved = torch.empty(saved_shape(batch, length if save else 0, channels, states, orders))
    y = new_rows(rows.x.shape, rows.extents)
    kernel = _kernel("forward", states)
    chunks = [row.chunks(keep=save) for row in rows.extents]
    work = []
    for b, k in np.ndindex(batch, orders):
        table = rows.table(b, k, chunks[b])
        table[Arg.STATE], table[Arg.KEPT_STATES] = state[b, k].data_ptr(), saved[b, k].data_ptr()
        place(table, Arg.Y, y[b, k])
        work += [_task(kernel, table, share, states) for share in rows.shares()]
    native.run(work, rows.threads)
    return y, state, saved


def scan_rows_backward(rows: Rows, dy: Tensor, dfinal_state: Tensor | None, saved: Tensor) -> RowGradients:
    """`dy` is (B, K or 1, L, D), `dfinal_state` (B, K, D, N), `saved` as `scan_rows` returned it."""
    batch, orders, length, channels = rows.x.shape
    states, shares = rows.A.shape[2], rows.shares()
    dy = readable(dy)
    dx, ddt = (new_rows(rows.x.shape, rows.extents) for _ in range(2))
    dz = None if rows.z is None else new_rows(rows.z.shape, rows.extents)
    dstate = rows.start(dfinal_state)
    dA = torch.zeros_like(dstate)
    dD, dbias = (torch.zeros(batch, *rows.D.shape) for _ in range(2))
    dB, dC = (torch.zeros(len(shares), batch, orders, length, states) for _ in range(2))
    kernel = _kernel("backward", states)
    chunks = [row.chunks() for row in rows.extents]
    work = []
    for b, k in np.ndindex(batch, orders):
        table = rows.table(b, k, chunks[b])
        place(table, Arg.DY, orders_of(dy, b, k))
        table[Arg.STATE], table[Arg.KEPT_STATES] = dstate[b, k].data_ptr(), saved[b, k].data_ptr()
        for arg, tensor in ((Arg.DX, dx), (Arg.DDT, ddt), (Arg.DZ, dz)):
            if tensor is not None:
                place(table, arg, tensor[b, k])
        for arg, tensor in ((Arg.DA, dA), (Arg.DD, dD), (Arg.DBIAS, dbias)):
            table[arg] = tensor[b, k].data_ptr()
        for part, share in enumerate(shares):  # a task's sums over its own channels
            table[Arg.DB], table[Arg.DC] = dB[part, b, k].data_ptr(), dC[part, b, k].data_ptr()
            work.append(_task(kernel, table, share, states))
    native.run(work, rows.threads)
    return RowGradients(
        dx,
        ddt,
        dz,
        dB.sum(0),
        dC.sum(0),
        rows.cut.whole(dA.sum(0)),
        dD.sum(0).flatten(1)[:, :channels].contiguous(),
        dbias.sum(0).flatten(1)[:, :channels].contiguous(),
        rows.cut.whole(dstate),
    )


def make_rows(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, seq_idx: Tensor | None, walks: Sequence[np.ndarray],
) -> Rows:  # fmt: skip
    """From x, dt (B, K, L, D), A (K, D, N), B, C (B, K, L, N), D, dt_bias (K, D), z (B, 1, L, D), seq_idx (B, L)."""
    batch, orders, length, channels = x.shape
    cut = Cut(channels, native.host().lanes)
    return Rows(
        readable(x),
        readable(dt),
        None if z is None else readable(z),
        readable(B),
        readable(C),
        cut.blocked(A.float() * LOG2E),
        cut.vectors(D, orders),
        cut.vectors(dt_bias, orders),
        dt_softplus,
        cut,
        walks,
        extents(seq_idx, batch, length),
    )


def _one_order(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, seq_idx: Tensor | None,
) -> Rows:  # fmt: skip
    x, dt, B, C = (t[:, None] for t in (x, dt, B, C))
    D, dt_bias = (None if t is None else t[None] for t in (D, dt_bias))
    z = None if z is None else z[:, None]
    return make_rows(x, dt, A[None], B, C, D, z, dt_bias, dt_softplus, seq_idx, straight(x.shape[2]))


def _task(kernel: native.Kernel, table: list[int], share: range, states: int) -> native.Task:
    table = list(table)

    def run() -> None:
        scratch = torch.empty(kernels.scratch_floats(native.host().lanes, states))
        table[Arg.SCRATCH] = scratch.data_ptr()
        kernel(table, share.start, share.stop)

    return run


@functools.cache
def _kernel(direction: str, states: int) -> native.Kernel:
    """Compiled on first use, each direction by itself."""
    host = native.host()
    emit, group = (kernels.forward, 16) if direction == "forward" else (kernels.backward, 8)
    # On 16 registers (AVX2, SSE) groups half as large spare LLVM its spills, yet they were slower.
    return native.Kernel(direction, emit(direction, host.lanes, host.avx512, states, group))
