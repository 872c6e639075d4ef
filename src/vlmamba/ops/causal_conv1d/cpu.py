"""The causal convolution in native code on the CPU: float32 inside, other dtypes converted at the door.

Legend: B batch, K orders (1 for a plain sequence), L length, D channels, W taps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmamba.ops import native
from vlmamba.ops.causal_conv1d import kernels, reference
from vlmamba.ops.causal_conv1d.kernels import Arg
from vlmamba.ops.rows import Cut, Extent, extents, new_rows, orders_of, place, readable, start_table, straight

UPDATES = 6  # what one output costs, in units of the scan's state updates


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None,
    seq_idx: Tensor | None, return_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y (B, L, D) and the last W - 1 inputs (B, W-1, D), both in x's dtype; the second empty if not wanted."""
    batch, length, _ = x.shape
    before = None if initial_state is None else initial_state.transpose(1, 2)[:, None]
    y, window = conv_rows(
        x[:, None], weight[None], _one(bias), activation, before, extents(seq_idx, batch, length), straight(length)
    )
    if not return_final_state:
        return y[:, 0].to(x.dtype), x.new_empty(0)
    last = Cut(x.shape[2], native.host().lanes).whole(window)[:, 0]
    return y[:, 0].to(x.dtype), last.transpose(1, 2).to(x.dtype).contiguous()


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    initial_state: Tensor | None, seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of (x, weight, bias, initial_state)."""
    if dfinal_state is not None or initial_state is not None:
        # Gradients across a state are for tests of exactness: no training passes one. The plain form will do.
        return reference.backward(dy, dfinal_state, x, weight, bias, activation, initial_state, seq_idx)
    batch, length, _ = x.shape
    dx, dweight, dbias = conv_rows_backward(
        dy[:, None], x[:, None], weight[None], _one(bias), activation, extents(seq_idx, batch, length), straight(length)
    )
    return (
        dx[:, 0].to(x.dtype),
        dweight[0].to(weight.dtype),
        None if bias is None else dbias[0].to(bias.dtype),
        None,
    )


def conv_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, before: Tensor | None,
    rows: Sequence[Extent], walks: Sequence[np.ndarray],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (B, K or 1, L, D), weight (K, D, W), bias (K, D), before (B, K, D, W-1) to y (B, K, L, D) and the windows
    (B, K, blocks, W-1, lanes) after the rows, all float32."""
    chunks = [row.chunks() for row in rows]
    return _run("forward", x, weight, bias, activation, before, rows, walks, chunks)


def conv_rows_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, rows: Sequence[Extent],
    walks: Sequence[np.ndarray],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dy (B, K, L, D); the rest as in `conv_rows`. Gradients of x (B, K, L, D), weight (K, D, W) and bias (K, D)."""
    orders, channels, taps = weight.shape
    cut = Cut(channels, native.host().lanes)
    dweight = torch.zeros(len(rows), orders, cut.blocks, taps, cut.lanes)
    dbias = torch.zeros(len(rows), orders, cut.blocks, 1, cut.lanes)
    chunks = [row.chunks() for row in rows]
    dpre, _ = _run(
        "backward", x, weight, bias, activation, None, rows, walks, chunks, gradients=(readable(dy), dweight, dbias)
    )
    # A row's walk backward starts at its last valid step.
    back = [[walk[: row.valid][::-1].copy() for walk in walks] for row in rows]
    dx, _ = _run("forward", dpre, weight, None, None, None, rows, back, [row.chunks_back() for row in rows])
    return dx, cut.whole(dweight.sum(0)), cut.whole(dbias.sum(0))[..., 0]


def _run(
    direction: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, before: Tensor | None,
    rows: Sequence[Extent], walks: Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]], chunks: Sequence[np.ndarray],
    gradients: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Walks are given for every order, or for every row and order."""
    orders, channels, taps = weight.shape
    batch, _, length, _ = x.shape
    x, cut = readable(x), Cut(channels, native.host().lanes)
    weights, biases = cut.blocked(weight), cut.vectors(bias, orders)
    window = torch.zeros(batch, orders, cut.blocks, taps - 1, cut.lanes) if before is None else cut.blocked(before)
    y = new_rows((batch, orders, length, channels), rows)
    kernel = _kernel(direction, taps, activation == "silu")
    threads = native.threads_for(UPDATES * y.numel())
    work = []
    for b, k in np.ndindex(batch, orders):
        walk = walks[k] if isinstance(walks[0], np.ndarray) else walks[b][k]
        assert isinstance(walk, np.ndarray)
        table = start_table(kernels.ARGUMENTS, cut, chunks[b], walk)
        place(table, Arg.X, orders_of(x, b, k))
        place(table, Arg.Y, y[b, k])
        table[Arg.WEIGHT], table[Arg.BIAS] = weights[k].data_ptr(), biases[k].data_ptr()
        table[Arg.WINDOW] = window[b, k].data_ptr()
        if gradients is not None:
            dy, dweight, dbias = gradients
            place(table, Arg.DY, dy[b, k])
            table[Arg.DWEIGHT], table[Arg.DBIAS] = dweight[b, k].data_ptr(), dbias[b, k].data_ptr()
        for share in cut.shares(batch * orders, threads):
            work.append(functools.partial(kernel, table, share.start, share.stop))
    native.run(work, threads)
    return y, window


def _one(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias[None]


@functools.cache
def _kernel(direction: str, taps: int, silu: bool) -> native.Kernel:
    host = native.host()
    emit = kernels.forward if direction == "forward" else kernels.backward
    return native.Kernel(direction, emit(direction, host.lanes, host.avx512, taps, silu))
