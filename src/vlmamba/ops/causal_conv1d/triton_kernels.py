"""The Triton kernels of the causal convolution. A program has BLOCK_D channels and some steps of one row; T steps are
loaded at once and then done one after another, the W - 1 inputs before them in registers.

A group of steps inside one sequence needs no conditions and is done without (PLAIN); elsewhere the marks of the steps
say which inputs belong together: the number of the sequence, negative for padding and beyond the end.

`rows_k` is K, the orders in which each of B inputs is walked; `*_b`, `*_k`, `*_l` are strides of batch, order and step.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102
# (Triton's language looks like Python, but only its own compiler knows the types of its names; it has no starred
# tuples, and a condition known to it must stand apart from one that is not.)

from __future__ import annotations

import triton
import triton.language as tl

from vlmamba.ops.lanes import position, sigmoid


@triton.jit
def _taps(weight, d, in_d, W: tl.constexpr):
    """The W weights of each channel, oldest input first, as W separate vectors."""
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.load(weight + d * W + j, mask=in_d, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _shift(bias, d, in_d, HAS_BIAS: tl.constexpr):
    shift = tl.zeros(d.shape, tl.float32)
    if HAS_BIAS:
        shift += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    return shift


@triton.jit
def _at(row, stride, start, i: tl.constexpr, length, orders, k, height, width, GRID: tl.constexpr):
    """Where step `start + i` stands."""
    if GRID:
        step = tl.minimum(tl.maximum(start + i, 0), length - 1)
        place = row + position(step, length, orders, k, height, width, GRID).to(tl.int64) * stride
    else:
        place = row + start.to(tl.int64) * stride + i * stride
    return place


@triton.jit
def _fetch(row, stride, start, length, orders, k, height, width, in_d, T: tl.constexpr, GRID: tl.constexpr):
    """T steps from `start`, as they stand in memory; beyond the end, anything."""
    raw = ()
    for i in tl.static_range(T):
        place = _at(row, stride, start, i, length, orders, k, height, width, GRID)
        raw = raw + (tl.load(place, mask=in_d & (start + i < length)),)
    return raw


@triton.jit
def _before(
    x_row, x_l, initial, start, length, dim, orders, k, height, width, d, in_d,
    W: tl.constexpr, GRID: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """The W - 1 inputs before `start`, oldest first: from x; before step 0 from the initial state, or zero."""
    window = ()
    for j in tl.static_range(W - 1):
        step = start + (j - (W - 1))
        place = _at(x_row, x_l, start, j - (W - 1), length, orders, k, height, width, GRID)
        value = tl.load(place, mask=in_d & (step >= 0), other=0.0).to(tl.float32)
        if HAS_INITIAL:
            held = initial + tl.maximum(step + (W - 1), 0) * dim + d
            value += tl.load(held, mask=in_d & (step < 0), other=0.0).to(tl.float32)
        window = window + (value,)
    return window


@triton.jit
def _plain(seq, start, length, STEPS: tl.constexpr, W: tl.constexpr, HAS_SEQ: tl.constexpr):
    """Whether STEPS steps from `start`, and the W - 1 before them, are of one sequence."""
    plain = start + STEPS <= length
    if HAS_SEQ:
        SPAN: tl.constexpr = triton.next_power_of_2(STEPS + W - 1)
        step = tl.maximum(start - (W - 1) + tl.minimum(tl.arange(0, SPAN), STEPS + W - 2), 0)
        marks = tl.load(seq + step, mask=step < length, other=-1)
        lowest = tl.min(marks, 0)
        plain = (lowest >= 0) & (lowest == tl.max(marks, 0))
    return plain


@triton.jit
def _marks(seq, start, length, STEPS: tl.constexpr, W: tl.constexpr, HAS_SEQ: tl.constexpr):
    """The marks of STEPS steps from `start` and of the W - 1 before them; before step 0 that of step 0."""
    marks = ()
    for i in tl.static_range(STEPS + W - 1):
        step = start + (i - (W - 1))
        mark = tl.where(step < length, 0, -1)
        if HAS_SEQ:
            mark = tl.load(seq + tl.maximum(step, 0), mask=step < length, other=-1)
        marks = marks + (mark,)
    return marks


@triton.jit
def _related(marks, i: tl.constexpr, W: tl.constexpr):
    """For each of the W inputs of step i: whether the step may read it. False for all where the step is padding."""
    near = marks[i + W - 1] >= 0
    related = (near,)
    for j in tl.static_range(1, W):
        near = near & (marks[i + W - j] == marks[i + W - 1 - j])
        related = (near,) + related
    return related


@triton.jit
def _select(related, window, W: tl.constexpr):
    seen = ()
    for j in tl.static_range(W):
        seen = seen + (tl.where(related[j], window[j], 0.0),)
    return seen


@triton.jit
def _convolve(seen, taps, shift, W: tl.constexpr):
    v = shift
    for j in tl.static_range(W):
        v += taps[j] * seen[j]
    return v


@triton.jit
def _forward_steps(
    window, raw, taps, shift, seq, y_row, final, start, length, dim, orders, k, height, width, d, in_d,
    T: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, GRID: tl.constexpr, HAS_SEQ: tl.constexpr,
    HAS_FINAL: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    if not PLAIN:
        marks = _marks(seq, start, length, T + 1, W, HAS_SEQ)
    for i in tl.static_range(T):
        seen = window + (raw[i].to(tl.float32),)
        window = seen[1:]
        if not PLAIN:
            seen = _select(_related(marks, i, W), seen, W)
        v = _convolve(seen, taps, shift, W)
        if SILU:
            v *= sigmoid(v)
        inside = in_d
        if not PLAIN:
            v = tl.where(marks[i + W - 1] >= 0, v, 0.0)
            inside = in_d & (start + i < length)
        place = _at(y_row, dim, start, i, length, orders, k, height, width, GRID)
        tl.store(place, v.to(y_row.dtype.element_ty), mask=inside)
        if HAS_FINAL and not PLAIN:
            if (marks[i + W - 1] >= 0) & (marks[i + W] < 0):  # the last step of the row
                for j in tl.static_range(1, W):
                    tl.store(final + (j - 1) * dim + d, seen[j].to(final.dtype.element_ty), mask=in_d)
    return window


@triton.jit
def conv_forward_kernel(
    x, weight, bias, initial, seq_idx, y, final, length, dim, rows_k, orders, height, width, chunk, x_b, x_l,
    W: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr, GRID: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """`chunk` steps, a multiple of T."""
    row = tl.program_id(2).to(tl.int64)
    b, k = row // rows_k, row % rows_k
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < dim
    first = tl.program_id(1) * chunk
    seq, initial_row, final_row = seq_idx, initial, final + b * (W - 1) * dim
    if HAS_SEQ:
        seq += b * length
    if HAS_INITIAL:
        initial_row += b * (W - 1) * dim
    x_row, y_row = x + b * x_b + d, y + row * length * dim + d
    taps, shift = _taps(weight + k * dim * W, d, in_d, W), _shift(bias, k * dim + d, in_d, HAS_BIAS)
    window = _before(
        x_row, x_l, initial_row, first, length, dim, orders, k, height, width, d, in_d, W, GRID, HAS_INITIAL
    )
    for done in range(0, tl.minimum(chunk, length - first), T):
        start = first + done
        raw = _fetch(x_row, x_l, start, length, orders, k, height, width, in_d, T, GRID)
        # A row's last step is never plain: it writes the final state.
        if _plain(seq, start, length, T + 1 if HAS_FINAL else T, W, HAS_SEQ):
            window = _forward_steps(
                window, raw, taps, shift, seq, y_row, final_row, start, length, dim, orders, k, height, width, d, in_d,
                T, W, SILU, GRID, HAS_SEQ, HAS_FINAL, True,
            )  # fmt: skip
        else:
            window = _forward_steps(
                window, raw, taps, shift, seq, y_row, final_row, start, length, dim, orders, k, height, width, d, in_d,
                T, W, SILU, GRID, HAS_SEQ, HAS_FINAL, False,
            )  # fmt: skip
    if HAS_FINAL:
        nothing = (first == 0) & (length == 0)
        if HAS_SEQ:
            nothing = (first == 0) & (tl.load(seq, mask=length > 0, other=-1) < 0)
        if nothing:  # nothing was read: the window is as it was
            for j in tl.static_range(W - 1):
                old = tl.zeros([BLOCK_D], tl.float32)
                if HAS_INITIAL:
                    old += tl.load(initial_row + j * dim + d, mask=in_d, other=0.0).to(tl.float32)
                tl.store(final_row + j * dim + d, old.to(final.dtype.element_ty), mask=in_d)


@triton.jit
def _backward_steps(
    window, open, sums, raw_x, raw_dy, taps, shift, seq, dfinal, dx_row, dinitial, start, first, last, length, dim,
    orders, k, height, width, d, in_d,
    T: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, GRID: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_SEQ: tl.constexpr, HAS_DFINAL: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """T steps from `start`, which add to the gradients of the W - 1 inputs before them (`open`) and of the weights and
    the bias (`sums`)."""
    if not PLAIN:
        marks = _marks(seq, start, length, T, W, HAS_SEQ)
    for i in tl.static_range(T):
        seen = window + (raw_x[i].to(tl.float32),)
        window = seen[1:]
        grad = raw_dy[i].to(tl.float32)
        if not PLAIN:
            related = _related(marks, i, W)
            seen = _select(related, seen, W)
            grad = tl.where(related[W - 1], grad, 0.0)
        if SILU:
            v = _convolve(seen, taps, shift, W)
            gate = sigmoid(v)
            grad *= gate * (1.0 + v * (1.0 - gate))
        added = ()
        complete = ()
        for j in tl.static_range(W):
            added = added + (sums[j] + grad * seen[j],)
            own = grad
            if not PLAIN:
                own = tl.where(related[j], grad, 0.0)
            complete = complete + ((open[j] if j < W - 1 else 0.0) + own * taps[j],)
        sums = added + (sums[W] + grad,)
        done = complete[0]
        open = complete[1:]
        step = start + (i - (W - 1))  # whose gradient is complete
        if HAS_DFINAL and not PLAIN:
            done += _final_grad(marks, i, step, dfinal, dim, d, in_d, W)
        place = _at(dx_row, dim, start, i - (W - 1), length, orders, k, height, width, GRID)
        tl.store(place, done.to(dx_row.dtype.element_ty), mask=in_d & (step >= first) & (step < last))
        if HAS_INITIAL:
            if step < 0:
                tl.store(dinitial + (step + W - 1) * dim + d, done.to(dinitial.dtype.element_ty), mask=in_d)
    return window, open, sums


@triton.jit
def _final_grad(marks, i: tl.constexpr, step, dfinal, dim, d, in_d, W: tl.constexpr):
    """What the final state adds to the gradient of the input at `step`, W - 1 before step i of the group: it holds
    that input if step i is past the end and no other sequence began after the input."""
    kept = (marks[i + W - 1] < 0) & ((step < 0) | (marks[i] >= 0))
    place = step * 0
    for j in tl.static_range(1, W):
        past = (marks[i + j] < 0) & (step + j >= 0)
        kept = kept & ((marks[i + j] == marks[i + j - 1]) | (marks[i + j] < 0))
        if j < W - 1:
            place += past.to(tl.int32)
    return tl.load(dfinal + place * dim + d, mask=in_d & kept, other=0.0).to(tl.float32)


@triton.jit
def conv_backward_kernel(
    dy, dfinal, x, weight, bias, initial, seq_idx, dx, parts, dinitial, length, dim, rows_k, orders, height, width,
    chunk, dy_b, dy_k, dy_l, x_b, x_l,
    W: tl.constexpr, T: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr, GRID: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_DFINAL: tl.constexpr,
):  # fmt: skip
    """`chunk` steps, a multiple of T, and the W - 1 after them, whose outputs depend on these inputs."""
    row = tl.program_id(2).to(tl.int64)
    b, k = row // rows_k, row % rows_k
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < dim
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, length)
    seq = seq_idx
    if HAS_SEQ:
        seq += b * length
    initial_row, dinitial_row, dfinal_row = initial, dinitial, dfinal
    if HAS_INITIAL:
        initial_row += b * (W - 1) * dim
        dinitial_row += b * (W - 1) * dim
    if HAS_DFINAL:
        dfinal_row += b * (W - 1) * dim
    x_row, dy_row, dx_row = x + b * x_b + d, dy + b * dy_b + k * dy_k + d, dx + row * length * dim + d
    taps, shift = _taps(weight + k * dim * W, d, in_d, W), _shift(bias, k * dim + d, in_d, HAS_BIAS)
    window = _before(
        x_row, x_l, initial_row, first, length, dim, orders, k, height, width, d, in_d, W, GRID, HAS_INITIAL
    )
    open = ()
    sums = (tl.zeros([BLOCK_D], tl.float32),)
    for _ in tl.static_range(W - 1):
        open = open + (tl.zeros([BLOCK_D], tl.float32),)
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros([BLOCK_D], tl.float32),)
    end = first  # steps from here on are another program's, or beyond the end: they count for these inputs alone
    for done in range(0, last - first, T):
        start = first + done
        raw_x = _fetch(x_row, x_l, start, length, orders, k, height, width, in_d, T, GRID)
        raw_dy = _fetch(dy_row, dy_l, start, length, orders, k, height, width, in_d, T, GRID)
        if _plain(seq, start, length, T, W, HAS_SEQ):
            window, open, sums = _backward_steps(
                window, open, sums, raw_x, raw_dy, taps, shift, seq, dfinal_row, dx_row, dinitial_row, start, first,
                last, length, dim, orders, k, height, width, d, in_d, T, W, SILU, GRID, HAS_INITIAL, HAS_SEQ,
                HAS_DFINAL, True,
            )  # fmt: skip
        else:
            window, open, sums = _backward_steps(
                window, open, sums, raw_x, raw_dy, taps, shift, seq, dfinal_row, dx_row, dinitial_row, start, first,
                last, length, dim, orders, k, height, width, d, in_d, T, W, SILU, GRID, HAS_INITIAL, HAS_SEQ,
                HAS_DFINAL, False,
            )  # fmt: skip
        end = start + T
    raw_x = _fetch(x_row, x_l, end, length, orders, k, height, width, in_d, W - 1, GRID)
    raw_dy = _fetch(dy_row, dy_l, end, length, orders, k, height, width, in_d, W - 1, GRID)
    _backward_steps(
        window, open, sums, raw_x, raw_dy, taps, shift, seq, dfinal_row, dx_row, dinitial_row, end, first, last,
        length, dim, orders, k, height, width, d, in_d, W - 1, W, SILU, GRID, HAS_INITIAL, HAS_SEQ, HAS_DFINAL, False,
    )  # fmt: skip
    part = parts + (row * tl.num_programs(1) + tl.program_id(1)) * (W + 1) * dim + d
    for j in tl.static_range(W + 1 if HAS_BIAS else W):
        tl.store(part + j * dim, sums[j], mask=in_d)
