"""The Triton kernels of the causal convolution. `rows_k` is K, the orders in which each of B inputs is walked; `*_b`,
`*_k`, `*_l` are strides of batch, order and step. Forward, a program computes BLOCK_L steps of BLOCK_D channels side by
side; backward, it walks CHUNK steps of them. W taps."""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102
# (Triton's language looks like Python, but only its own compiler knows the types of its names; it has no starred
# tuples, and a condition known to it must stand apart from one that is not.)

from __future__ import annotations

import triton
import triton.language as tl

from vlmamba.ops.lanes import is_reset, position, sigmoid


@triton.jit
def _taps(weight, d, in_d, W: tl.constexpr):
    """The W weights of each channel, oldest input first, as W separate vectors."""
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(weight + d * W + j, mask=in_d, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _before(
    x_row, initial, initial_row, seq_idx, seq_row, first, length, dim, orders, k, height, width, x_l, d, in_d,
    W: tl.constexpr, GRID: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """The W - 1 inputs before step `first`, oldest first: from x, from the initial state before step 0, or zero."""
    window = ()
    for j in tl.static_range(W - 1):
        step = first - (W - 1) + j
        p = position(tl.maximum(step, 0), length, orders, k, height, width, GRID)
        same = step >= 0
        if HAS_SEQ:
            for i in tl.static_range(
                j + 1, W
            ):  # no reset at steps first - (W - 1) + i, up to and including `first - 1`
                if i < W - 1:
                    same = same & (is_reset(seq_idx, seq_row, tl.maximum(first - (W - 1) + i, 0)) == 0)
        value = tl.load(x_row + p * x_l + d, mask=in_d & same, other=0.0).to(tl.float32)
        if HAS_INITIAL:
            i_row = tl.maximum(step + W - 1, 0)
            value += tl.load(initial + (initial_row + i_row) * dim + d, mask=in_d & (step < 0), other=0.0).to(
                tl.float32
            )
        window = window + (value,)
    return window


@triton.jit
def _clear(window, reset, W: tl.constexpr):
    """The window, or zeros where a new sequence begins."""
    cleared = ()
    for j in tl.static_range(W):
        cleared = cleared + (tl.where(reset, 0, window[j]),)
    return cleared


@triton.jit
def forward_kernel(
    x, weight, bias, initial, seq_idx, y, final, length, dim, rows_k, orders, height, width, x_b, x_l,
    W: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr, GRID: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """BLOCK_L steps of BLOCK_D channels side by side: each input is loaded W times, but from memory once."""
    row = tl.program_id(2).to(tl.int64)
    b, k = row // rows_k, row % rows_k
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    step = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    in_d, valid = d < dim, step < length
    last = step == length - 1
    if HAS_SEQ:
        seq = seq_idx + b * length
        valid = tl.load(seq + step, mask=valid, other=-1) >= 0
        last = valid & ((step == length - 1) | (tl.load(seq + step + 1, mask=step + 1 < length, other=-1) < 0))
    v = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    if HAS_BIAS:
        v += tl.load(bias + k * dim + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(W):  # the oldest input first
        before = step - (W - 1 - j)
        same = valid
        if HAS_SEQ:
            for i in tl.static_range(W - 1 - j):  # no new sequence between that input and this step
                inside = valid & (step - i > 0)
                newer = tl.load(seq + step - i, mask=inside, other=0)
                same = same & (newer == tl.load(seq + step - i - 1, mask=inside, other=0))
        p = position(tl.maximum(before, 0), length, orders, k, height, width, GRID)
        at = x + b * x_b + p[:, None].to(tl.int64) * x_l + d[None, :]
        value = tl.load(at, mask=(same & (before >= 0))[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        if HAS_INITIAL and j < W - 1:
            if tl.program_id(1) == 0:
                held = initial + (b * (W - 1) + tl.maximum(before + W - 1, 0))[:, None] * dim + d[None, :]
                value += tl.load(held, mask=(same & (before < 0))[:, None] & in_d[None, :], other=0.0).to(tl.float32)
        v += tl.load(weight + (k * dim + d) * W + j, mask=in_d, other=0.0).to(tl.float32)[None, :] * value
        if HAS_FINAL and j > 0:
            kept = final + (b * (W - 1) + j - 1) * dim + d[None, :] + step[:, None] * 0
            tl.store(kept, value.to(final.dtype.element_ty), mask=last[:, None] & in_d[None, :])
    if SILU:
        v *= sigmoid(v)
    v = tl.where(valid[:, None], v, 0.0)
    p = position(tl.minimum(step, tl.maximum(length - 1, 0)), length, orders, k, height, width, GRID)
    out = y + (row * length + p[:, None]) * dim + d[None, :]
    tl.store(out, v.to(y.dtype.element_ty), mask=(step < length)[:, None] & in_d[None, :])
    if HAS_FINAL:
        nothing = (tl.program_id(1) == 0) & (length == 0)
        if HAS_SEQ:
            nothing = (tl.program_id(1) == 0) & (tl.load(seq, mask=length > 0, other=-1) < 0)
        if nothing:  # nothing was read: the window is as it was
            for j in tl.static_range(W - 1):
                old = tl.zeros([BLOCK_D], tl.float32)
                if HAS_INITIAL:
                    old += tl.load(initial + (b * (W - 1) + j) * dim + d, mask=in_d, other=0.0).to(tl.float32)
                tl.store(final + (b * (W - 1) + j) * dim + d, old.to(final.dtype.element_ty), mask=in_d)


@triton.jit
def backward_kernel(
    dy, dfinal, x, weight, bias, initial, seq_idx, lengths, dx, dweight, dbias, dinitial,
    length, dim, rows_k, orders, height, width, dy_b, dy_k, dy_l, x_b, x_l,
    W: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr, GRID: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_DFINAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    b, k = row // rows_k, row % rows_k
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < dim
    taps = _taps(weight + k * dim * W, d, in_d, W)
    end = length
    if HAS_SEQ:
        end = tl.load(lengths + b)
    first = tl.program_id(1) * CHUNK
    window = _before(
        x + b * x_b, initial, b * (W - 1), seq_idx, b * length, first, length, dim, orders, k, height, width, x_l,
        d, in_d, W, GRID, HAS_INITIAL, HAS_SEQ,
    )  # fmt: skip
    last = tl.minimum(first + CHUNK, end)
    # open[j]: the gradient so far of the input at step - (W - 1) + j, which the outputs still to come complete;
    # same[j]: 1 while that input belongs to the sequence of the step
    open = ()
    same = ()
    taps_grad = ()
    for _ in tl.static_range(W - 1):
        open = open + (tl.zeros([BLOCK_D], tl.float32),)
        same = same + (first * 0 + 1,)
    for _ in tl.static_range(W):
        taps_grad = taps_grad + (tl.zeros([BLOCK_D], tl.float32),)
    bias_grad = tl.zeros([BLOCK_D], tl.float32)
    for step in range(first, last + W - 1):
        within = step < end
        p = position(tl.minimum(step, length - 1), length, orders, k, height, width, GRID)
        if HAS_SEQ:
            reset = within & is_reset(seq_idx, b * length, tl.minimum(step, length - 1))
            window = _clear(window, reset, W - 1)
            same = _clear(same, reset, W - 1)
        window = window + (tl.load(x + b * x_b + p * x_l + d, mask=in_d & within, other=0.0).to(tl.float32),)
        grad = tl.load(dy + b * dy_b + k * dy_k + p * dy_l + d, mask=in_d & within, other=0.0).to(tl.float32)
        if SILU:
            v = tl.zeros([BLOCK_D], tl.float32)
            if HAS_BIAS:
                v += tl.load(bias + k * dim + d, mask=in_d, other=0.0).to(tl.float32)
            for j in tl.static_range(W):
                v += taps[j] * window[j]
            gate = sigmoid(v)
            grad *= gate * (1.0 + v * (1.0 - gate))
        own = step < last
        bias_grad += tl.where(own, grad, 0.0)
        summed = ()
        complete = ()
        for j in tl.static_range(W):
            summed = summed + (taps_grad[j] + tl.where(own, grad * window[j], 0.0),)
            reached = grad * taps[j]
            if j < W - 1:
                reached = open[j] + (tl.where(same[j] != 0, reached, 0.0) if HAS_SEQ else reached)
            complete = complete + (reached,)
        taps_grad = summed
        _store_input_grad(
            complete[0], dfinal, dx, dinitial, row, b, step - (W - 1), first, end, length, dim, orders, k, height,
            width, seq_idx, d, in_d, W, GRID, HAS_INITIAL, HAS_SEQ, HAS_DFINAL,
        )  # fmt: skip
        open = complete[1:]
        window = window[1:]
        if HAS_SEQ and W > 1:
            same = same[1:] + (first * 0 + 1,)
    part = row * tl.num_programs(1) + tl.program_id(1)
    for j in tl.static_range(W):
        tl.store(dweight + (part * W + j) * dim + d, taps_grad[j], mask=in_d)
    if HAS_BIAS:
        tl.store(dbias + part * dim + d, bias_grad, mask=in_d)


@triton.jit
def _store_input_grad(
    grad, dfinal, dx, dinitial, row, b, step, first, end, length, dim, orders, k, height, width, seq_idx, d, in_d,
    W: tl.constexpr, GRID: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_DFINAL: tl.constexpr,
):  # fmt: skip
    """Write the finished gradient of the input at `step`; before step 0 that input is a row of the initial state."""
    if HAS_DFINAL:
        kept = (step >= end - (W - 1)) & ((step >= first) | (first == 0))
        if HAS_SEQ:
            for i in tl.static_range(1, W - 1):  # the final state holds the last sequence only
                later = step + i
                inside = (later < end) & (later > 0)
                kept = kept & (
                    (is_reset(seq_idx, b * length, tl.minimum(tl.maximum(later, 0), length - 1)) & inside) == 0
                )
        i_row = tl.maximum(step - (end - (W - 1)), 0)
        grad += tl.load(dfinal + (b * (W - 1) + i_row) * dim + d, mask=in_d & kept, other=0.0).to(tl.float32)
    if (step >= first) & (step >= 0):
        p = position(step, length, orders, k, height, width, GRID)
        tl.store(dx + (row * length + p) * dim + d, grad.to(dx.dtype.element_ty), mask=in_d)
    if HAS_INITIAL:
        if step < 0:
            tl.store(dinitial + (b * (W - 1) + step + W - 1) * dim + d, grad.to(dinitial.dtype.element_ty), mask=in_d)
