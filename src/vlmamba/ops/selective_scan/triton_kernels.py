"""The Triton kernels of the selective scan: forward, backward, and the passes over segments before them. What they
compute and why they are cut so is said in `triton.py`, how lanes share the work in `vlmamba.ops.lanes`.

A row is a sequence, or one of K orders of an image; `rows_k` is K, and `*_b`, `*_k`, `*_l` are strides of batch, order
and step.
S lanes share a group of 4 channels, NS states each; T steps are done together."""

# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102
# (Triton's language looks like Python, but only its own compiler knows the types of its names; it has no starred
# tuples, and a condition known to it must stand apart from one that is not.)

from __future__ import annotations

import triton
import triton.language as tl

from vlmamba.ops.lanes import (
    LOG2E,
    decayed,
    fetch,
    fetch_states,
    fold,
    keep_unless,
    load_matrix,
    load_values,
    over_groups,
    own_total,
    places,
    sigmoid,
    softplus,
    spread,
    store_matrix,
    store_values,
    unpack,
    zeros,
)  # fmt: skip


@triton.jit
def _row(rows_k):
    """(row, its batch, its order)."""
    row = tl.program_id(2).to(tl.int64)
    return row, row // rows_k, row % rows_k


@triton.jit
def _lanes(dim, S: tl.constexpr, NS: tl.constexpr):
    """(first channel of the lane's group, first state of the lane, the lane's own channel, the same within bounds)."""
    lane = tl.arange(0, 32)
    group = tl.program_id(0) * (128 // S) + lane // S * 4
    own = group + (lane & 3)
    return group, lane % S * NS, own, tl.minimum(own, dim - 1)


@triton.jit
def _segment(lengths, b, length, segment_length, HAS_SEQ: tl.constexpr):
    """(first step of the segment, the step behind its last, the step behind the row's last)."""
    end = tl.load(lengths + b) if HAS_SEQ else length
    begin = tl.program_id(1) * segment_length
    return begin, tl.minimum(begin + segment_length, end), end


@triton.jit
def _per_channel(pointer, k, dim, d, THERE: tl.constexpr):
    """Own channel's value of a (K, D) tensor, 0 without one."""
    return tl.load(pointer + k * dim + d) if THERE else tl.zeros([32], tl.float32)


@triton.jit
def _step_sizes(raw, bias, first, last, T: tl.constexpr, SOFTPLUS: tl.constexpr, WHOLE: tl.constexpr):
    """Own channel's dt at T steps, 0 from `last` on (the state stays), and what stood before the softplus."""
    sizes = ()
    before = ()
    for j in tl.static_range(T):
        v = raw[j].to(tl.float32) + bias
        size = softplus(v) if SOFTPLUS else v
        sizes = sizes + (size if WHOLE else tl.where(first + j < last, size, 0.0),)
        before = before + (v,)
    return sizes, before


@triton.jit
def _steps(first, last, length, orders, k, height, width, T: tl.constexpr, GRID: tl.constexpr, WHOLE: tl.constexpr):
    """Positions of T steps from `first`. Where the row divides into T steps each (WHOLE) only the group is kept
    inside, so that its steps stand at fixed distances from each other."""
    at = ()
    if WHOLE:
        start = tl.minimum(first, last - T).to(tl.int64)
        for j in tl.static_range(T):
            at = at + (start + j,)
    else:
        at = places(first, last, length, orders, k, height, width, T, GRID)
    return at


@triton.jit
def _resets(seq_idx, base, first, last, CHUNK: tl.constexpr, HAS_SEQ: tl.constexpr):
    """A word whose bit j says whether a new sequence begins at step `first + j` (never at step 0, which continues from
    the initial state)."""
    word = tl.zeros([], tl.int64)
    if HAS_SEQ:
        j = tl.arange(0, CHUNK)
        here = tl.load(seq_idx + base + first + j, mask=first + j < last, other=0)
        before = tl.load(seq_idx + base + tl.maximum(first + j - 1, 0), mask=first + j < last, other=0)
        word = tl.sum((here != before).to(tl.int64) << j.to(tl.int64), 0)
    return word


@triton.jit
def _is_in(resets, j):
    """Whether bit j of the word is set."""
    return ((resets >> j) & 1) != 0


@triton.jit
def _advance(h, a2, dt_t, dtx_t, B_t, S: tl.constexpr, NS: tl.constexpr):
    """One step: h = exp(dt A) h + dt x B."""
    dts, dtxs = spread(dt_t, S), spread(dtx_t, S)
    after = ()
    for e in tl.static_range(4 * NS):
        after = after + (tl.exp2(dts[e // NS] * a2[e]) * h[e] + dtxs[e // NS] * B_t[e % NS],)
    return after


@triton.jit
def _advance_with_slope(h, slope, a2, dt_t, dtx_t, B_t, S: tl.constexpr, NS: tl.constexpr):
    """The same, and dh / dA = exp(dt A) (dh / dA + dt h) of the states before."""
    dts, dtxs = spread(dt_t, S), spread(dtx_t, S)
    after = ()
    slopes = ()
    for e in tl.static_range(4 * NS):
        decay = tl.exp2(dts[e // NS] * a2[e])
        slopes = slopes + (decay * (slope[e] + dts[e // NS] * h[e]),)
        after = after + (decay * h[e] + dtxs[e // NS] * B_t[e % NS],)
    return after, slopes


@triton.jit
def _read_out(h, C_t, S: tl.constexpr, NS: tl.constexpr):
    """Own channel's C . h."""
    sums = ()
    for i in tl.static_range(4):
        total = h[i * NS] * C_t[0]
        for j in tl.static_range(1, NS):
            total += h[i * NS + j] * C_t[j]
        sums = sums + (total,)
    return own_total(sums, S)


@triton.jit
def scan_segment_kernel(
    x, dt, A, B, dt_bias, seq_idx, lengths, parts, spans,
    length, dim, states, rows_k, orders, height, width, segment_length, segments,
    x_b, x_k, x_l: tl.constexpr, dt_b, dt_k, dt_l: tl.constexpr, B_b, B_k, B_l: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr, S: tl.constexpr, NS: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state, beginning from zero, and its sum of dt."""
    row, b, k = _row(rows_k)
    group, state, _own, d = _lanes(dim, S, NS)
    a2 = load_matrix(A + k * dim * states, group, state, dim, states, LOG2E, NS)
    bias = _per_channel(dt_bias, k, dim, d, HAS_BIAS)
    begin, last, _end = _segment(lengths, b, length, segment_length, HAS_SEQ)
    x += b * x_b + k * x_k + d
    dt += b * dt_b + k * dt_k + d
    B += b * B_b + k * B_k + state
    h = zeros(4 * NS)
    span = tl.zeros([32], tl.float32)
    at = _steps(begin, last, length, orders, k, height, width, T, GRID, WHOLE)
    x_raw, dt_raw, B_raw = (
        fetch(x, x_l, at, T),
        fetch(dt, dt_l, at, T),
        fetch_states(B, B_l, at, states - state, T, NS, PACKED),
    )
    for chunk_first in range(begin, last, CHUNK):
        resets = _resets(seq_idx, b * length, chunk_first, last, CHUNK, HAS_SEQ)
        for first in range(chunk_first, tl.minimum(chunk_first + CHUNK, last), T):
            at = _steps(first + T, last, length, orders, k, height, width, T, GRID, WHOLE)
            x_next, dt_next = fetch(x, x_l, at, T), fetch(dt, dt_l, at, T)
            B_next = fetch_states(B, B_l, at, states - state, T, NS, PACKED)
            sizes, _ = _step_sizes(dt_raw, bias, first, last, T, SOFTPLUS, WHOLE)
            for j in tl.static_range(T):
                if HAS_SEQ:
                    reset = _is_in(resets, first - chunk_first + j)
                    h = keep_unless(reset, h)
                    span = tl.where(reset, float("nan"), span)
                span += sizes[j]
                B_t = unpack(B_raw[j], B.dtype.element_ty, PACKED)
                h = _advance(h, a2, sizes[j], sizes[j] * x_raw[j].to(tl.float32), B_t, S, NS)
            x_raw, dt_raw, B_raw = x_next, dt_next, B_next
    part = (row * segments + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    store_values(parts + part * (4 * NS * 32), h, NS)
    tl.store(spans + part * 32 + tl.arange(0, 32), span)


@triton.jit
def scan_forward_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, lengths, parts, spans, y, final, saved,
    length, dim: tl.constexpr, states, rows_k, orders, height, width, segment_length, segments, chunks,
    x_b, x_k, x_l: tl.constexpr, dt_b, dt_k, dt_l: tl.constexpr,
    B_b, B_k, B_l: tl.constexpr, C_b, C_k, C_l: tl.constexpr, z_b, z_l: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr, S: tl.constexpr, NS: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr, SAVE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_PARTS: tl.constexpr,
):  # fmt: skip
    row, b, k = _row(rows_k)
    blocks = tl.num_programs(0)
    group, state, own, d = _lanes(dim, S, NS)
    a2 = load_matrix(A + k * dim * states, group, state, dim, states, LOG2E, NS)
    bias = _per_channel(dt_bias, k, dim, d, HAS_BIAS)
    skip = _per_channel(D, k, dim, d, HAS_D)
    h = zeros(4 * NS)
    if HAS_INITIAL:
        h = load_matrix(initial + row * dim * states, group, state, dim, states, 1.0, NS)
    if HAS_PARTS:
        part = row * segments * blocks + tl.program_id(0)
        h = fold(h, parts + part * (4 * NS * 32), spans + part * 32, a2, tl.program_id(1), blocks, S, NS)
    begin, last, end = _segment(lengths, b, length, segment_length, HAS_SEQ)
    x += b * x_b + k * x_k + d
    dt += b * dt_b + k * dt_k + d
    B += b * B_b + k * B_k + state
    C += b * C_b + k * C_k + state
    y += row * length * dim + own
    at = _steps(begin, last, length, orders, k, height, width, T, GRID, WHOLE)
    x_raw, dt_raw, z_raw = fetch(x, x_l, at, T), fetch(dt, dt_l, at, T), ()
    B_raw = fetch_states(B, B_l, at, states - state, T, NS, PACKED)
    C_raw = fetch_states(C, C_l, at, states - state, T, NS, PACKED)
    if HAS_Z:
        z += b * z_b + d
        z_raw = fetch(z, z_l, at, T)
    for chunk_first in range(begin, last, CHUNK):
        if SAVE:
            store_values(
                saved + ((row * chunks + chunk_first // CHUNK) * blocks + tl.program_id(0)) * (4 * NS * 32), h, NS
            )
        resets = _resets(seq_idx, b * length, chunk_first, last, CHUNK, HAS_SEQ)
        for first in range(chunk_first, tl.minimum(chunk_first + CHUNK, last), T):
            next_at = _steps(first + T, last, length, orders, k, height, width, T, GRID, WHOLE)
            x_next, dt_next, z_next = fetch(x, x_l, next_at, T), fetch(dt, dt_l, next_at, T), ()
            B_next = fetch_states(B, B_l, next_at, states - state, T, NS, PACKED)
            C_next = fetch_states(C, C_l, next_at, states - state, T, NS, PACKED)
            if HAS_Z:
                z_next = fetch(z, z_l, next_at, T)
            sizes, _ = _step_sizes(dt_raw, bias, first, last, T, SOFTPLUS, WHOLE)
            ys = ()
            for j in tl.static_range(T):
                if HAS_SEQ:
                    h = keep_unless(_is_in(resets, first - chunk_first + j), h)
                x_t = x_raw[j].to(tl.float32)
                h = _advance(h, a2, sizes[j], sizes[j] * x_t, unpack(B_raw[j], B.dtype.element_ty, PACKED), S, NS)
                y_t = _read_out(h, unpack(C_raw[j], C.dtype.element_ty, PACKED), S, NS) + skip * x_t
                if HAS_Z:
                    z_t = z_raw[j].to(tl.float32)
                    y_t *= z_t * sigmoid(z_t)
                ys = ys + (y_t,)
            for j in tl.static_range(T):
                tl.store(y + at[j] * dim, ys[j].to(y.dtype.element_ty), mask=(own < dim) & (WHOLE | (first + j < last)))
            at, x_raw, dt_raw, z_raw, B_raw, C_raw = next_at, x_next, dt_next, z_next, B_next, C_next
    if SAVE:  # the state after the last step, where the backward pass begins
        if (last == end) & (begin < last):
            behind = (row * chunks + tl.cdiv(last, CHUNK)) * blocks + tl.program_id(0)
            store_values(saved + behind * (4 * NS * 32), h, NS)
    if HAS_SEQ:
        for step in range(tl.maximum(begin, last), tl.minimum(begin + segment_length, length)):
            tl.store(y + step * dim, tl.zeros([32], y.dtype.element_ty), mask=own < dim)
    if HAS_FINAL:
        if tl.program_id(1) == tl.maximum(end - 1, 0) // segment_length:
            store_matrix(final + row * dim * states, h, group, state, dim, states, NS)


@triton.jit
def scan_segment_grad_kernel(
    dy, dt, A, C, z, dt_bias, seq_idx, lengths, parts, spans,
    length, dim, states, rows_k, orders, height, width, segment_length, segments,
    dy_b, dy_l: tl.constexpr, dt_b, dt_k, dt_l: tl.constexpr, C_b, C_k, C_l: tl.constexpr, z_b, z_l: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr, S: tl.constexpr, NS: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the gradient of the state before it, and its sum of dt."""
    row, b, k = _row(rows_k)
    group, state, own, d = _lanes(dim, S, NS)
    a2 = load_matrix(A + k * dim * states, group, state, dim, states, LOG2E, NS)
    bias = _per_channel(dt_bias, k, dim, d, HAS_BIAS)
    begin, last, _end = _segment(lengths, b, length, segment_length, HAS_SEQ)
    dy += b * dy_b + d
    dt += b * dt_b + k * dt_k + d
    C += b * C_b + k * C_k + state
    g = zeros(4 * NS)
    span = tl.zeros([32], tl.float32)
    first_chunk, behind_chunk = begin // CHUNK, tl.cdiv(last, CHUNK)
    for back_chunk in range(first_chunk, behind_chunk):
        chunk_first = (first_chunk + behind_chunk - 1 - back_chunk) * CHUNK
        resets = _resets(seq_idx, b * length, chunk_first, last, CHUNK, HAS_SEQ)
        groups = tl.cdiv(tl.minimum(chunk_first + CHUNK, last) - chunk_first, T)
        for back in range(groups):
            first = chunk_first + (groups - 1 - back) * T
            at = _steps(first, last, length, orders, k, height, width, T, GRID, WHOLE)
            dy_raw, dt_raw = fetch(dy, dy_l, at, T), fetch(dt, dt_l, at, T)
            C_raw = fetch_states(C, C_l, at, states - state, T, NS, PACKED)
            if HAS_Z:
                z_raw = fetch(z + b * z_b + d, z_l, at, T)
            sizes, _ = _step_sizes(dt_raw, bias, first, last, T, SOFTPLUS, WHOLE)
            for j in tl.static_range(T - 1, -1, -1):
                dy_t = tl.where((own < dim) & (WHOLE | (first + j < last)), dy_raw[j].to(tl.float32), 0.0)
                if HAS_Z:
                    z_t = z_raw[j].to(tl.float32)
                    dy_t *= z_t * sigmoid(z_t)
                g = _add_output_grad(g, dy_t, unpack(C_raw[j], C.dtype.element_ty, PACKED), S, NS)
                g = decayed(g, a2, spread(sizes[j], S), NS)
                span += sizes[j]
                if HAS_SEQ:
                    reset = _is_in(resets, first - chunk_first + j)
                    g = keep_unless(reset, g)
                    span = tl.where(reset, float("nan"), span)
    part = (row * segments + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    store_values(parts + part * (4 * NS * 32), g, NS)
    tl.store(spans + part * 32 + tl.arange(0, 32), span)


@triton.jit
def _fetch_group(
    x, dt, dy, z, at, x_l: tl.constexpr, dt_l: tl.constexpr, dy_l: tl.constexpr, z_l: tl.constexpr, T: tl.constexpr,
    HAS_Z: tl.constexpr,
):  # fmt: skip
    """x, dt, dy and z (empty without one) of T steps."""
    z_raw = ()
    if HAS_Z:
        z_raw = fetch(z, z_l, at, T)
    return fetch(x, x_l, at, T), fetch(dt, dt_l, at, T), fetch(dy, dy_l, at, T), z_raw


@triton.jit
def _add_output_grad(g, dy_t, C_t, S: tl.constexpr, NS: tl.constexpr):
    """g + dy C, the gradient that reaches the state through its own output."""
    dys = spread(dy_t, S)
    total = ()
    for e in tl.static_range(4 * NS):
        total = total + (g[e] + dys[e // NS] * C_t[e % NS],)
    return total


@triton.jit
def scan_output_grad_kernel(
    dy, x, dt, A, B, C, D, z, dt_bias, seq_idx, lengths, saved, work, slopes, dA, dBC, dD, dz,
    length, dim, states, rows_k, orders, height, width, segment_length, segments, chunks,
    dy_b, dy_l: tl.constexpr, x_b, x_k, x_l: tl.constexpr, dt_b, dt_k, dt_l: tl.constexpr,
    B_b, B_k, B_l: tl.constexpr, C_b, C_k, C_l: tl.constexpr, z_b, z_l: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr, S: tl.constexpr, NS: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """Walks forward from the saved states: dC, dz, dD, and of each step `work` = sum over n of A dy C h.

    With the state goes its slope dh / dA since the chunk began, whose products with dy C are dA's share of the chunk;
    what the slope at its end (`slopes`) does to later steps is for the walk back to say. Nothing cancels."""
    row, b, k = _row(rows_k)
    group, state, own, d = _lanes(dim, S, NS)
    a2 = load_matrix(A + k * dim * states, group, state, dim, states, LOG2E, NS)
    none = tl.zeros([32], tl.float32)
    bias = _per_channel(dt_bias, k, dim, d, HAS_BIAS)
    skip = _per_channel(D, k, dim, d, HAS_D)
    begin, last, _end = _segment(lengths, b, length, segment_length, HAS_SEQ)
    dA_sum, dD_sum = zeros(4 * NS), none
    blocks = tl.num_programs(0)
    chunk = (row * chunks + begin // CHUNK) * blocks + tl.program_id(0)
    h = load_values(saved + chunk * (4 * NS * 32), NS)
    x += b * x_b + k * x_k + d
    dt += b * dt_b + k * dt_k + d
    B += b * B_b + k * B_k + state
    C += b * C_b + k * C_k + state
    dy += b * dy_b + d
    work += row * length * dim + own
    dBC += part_row(row, blocks) * length * (2 * states) + states
    if HAS_Z:
        z += b * z_b + d
        dz += b * length * dim + own
    at = _steps(begin, last, length, orders, k, height, width, T, GRID, WHOLE)
    x_raw, dt_raw, dy_raw, z_raw = _fetch_group(x, dt, dy, z, at, x_l, dt_l, dy_l, z_l, T, HAS_Z)
    for chunk_first in range(begin, last, CHUNK):
        slope = zeros(4 * NS)
        resets = _resets(seq_idx, b * length, chunk_first, last, CHUNK, HAS_SEQ)
        for first in range(chunk_first, tl.minimum(chunk_first + CHUNK, last), T):
            next_at = _steps(first + T, last, length, orders, k, height, width, T, GRID, WHOLE)
            x_next, dt_next, dy_next, z_next = _fetch_group(x, dt, dy, z, next_at, x_l, dt_l, dy_l, z_l, T, HAS_Z)
            B_raw = fetch_states(B, B_l, at, states - state, T, NS, PACKED)
            C_raw = fetch_states(C, C_l, at, states - state, T, NS, PACKED)
            sizes, _ = _step_sizes(dt_raw, bias, first, last, T, SOFTPLUS, WHOLE)
            for j in tl.static_range(T):
                valid = WHOLE | (first + j < last)
                inside = (own < dim) & valid
                if HAS_SEQ:
                    reset = _is_in(resets, first - chunk_first + j)
                    h, slope = keep_unless(reset, h), keep_unless(reset, slope)
                x_t = x_raw[j].to(tl.float32)
                dy_t = tl.where(inside, dy_raw[j].to(tl.float32), 0.0)
                B_t = unpack(B_raw[j], B.dtype.element_ty, PACKED)
                h, slope = _advance_with_slope(h, slope, a2, sizes[j], sizes[j] * x_t, B_t, S, NS)
                C_t = unpack(C_raw[j], C.dtype.element_ty, PACKED)
                if HAS_Z:
                    z_t = z_raw[j].to(tl.float32)
                    gate = sigmoid(z_t)
                    dz_t = dy_t * gate * (1.0 + z_t * (1.0 - gate))
                    dy_t *= z_t * gate
                share = over_groups(_weighted(h, dy_t, S, NS), S)
                _store_share(dBC + at[j] * (2 * states), share, states, valid, S, NS)
                y_t, w_t = _products(h, C_t, a2, S, NS)
                dA_sum = _add_weighted(dA_sum, slope, dy_t, C_t, S, NS)
                tl.store(work + at[j] * dim, dy_t * w_t, mask=inside)
                if HAS_Z:
                    tl.store(dz + at[j] * dim, (dz_t * (y_t + skip * x_t)).to(dz.dtype.element_ty), mask=inside)
                dD_sum += dy_t * x_t
            at, x_raw, dt_raw, dy_raw, z_raw = next_at, x_next, dt_next, dy_next, z_next
        chunk = (row * chunks + chunk_first // CHUNK) * blocks + tl.program_id(0)
        store_values(slopes + chunk * (4 * NS * 32), slope, NS)
    if HAS_SEQ:
        for step in range(tl.maximum(begin, last), tl.minimum(begin + segment_length, length)):
            _store_share(dBC + step * (2 * states), over_groups(zeros(NS), S), states, True, S, NS)
            if HAS_Z:
                tl.store(dz + step * dim, tl.zeros([32], dz.dtype.element_ty), mask=own < dim)
    per_segment = row * segments + tl.program_id(1)
    store_matrix(dA + per_segment * dim * states, dA_sum, group, state, dim, states, NS)
    if HAS_D:
        tl.store(dD + per_segment * dim + own, dD_sum, mask=own < dim)


@triton.jit
def scan_state_grad_kernel(
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, seq_idx, lengths, saved, work, slopes, parts, spans,
    dx, ddt, dA, dBC, dbias, dinitial,
    length, dim, states, rows_k, orders, height, width, segment_length, segments, chunks,
    dy_b, dy_l: tl.constexpr, x_b, x_k, x_l: tl.constexpr, dt_b, dt_k, dt_l: tl.constexpr,
    B_b, B_k, B_l: tl.constexpr, C_b, C_k, C_l: tl.constexpr, z_b, z_l: tl.constexpr,
    CHUNK: tl.constexpr, T: tl.constexpr, S: tl.constexpr, NS: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    PACKED: tl.constexpr, WHOLE: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr, HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr,
    HAS_PARTS: tl.constexpr,
):  # fmt: skip
    """Walks back with g, the gradient of the state: dx, ddt, dB, and the rest of dA.

    q_t = sum over n of A exp(dt A) g_t h_{t-1}, which ddt needs, is had without the states between: g_t h_t is both
    exp(dt A) g_t h_{t-1} + g_t dt_t x_t B_t and the same of the next step + dy_t C_t h_t, so going back q only gains
    A dy C h, which the forward walk left in `work`, and loses A g dt x B. At every CHUNK it is taken anew from a saved
    state, so that rounding does not gather."""
    row, b, k = _row(rows_k)
    blocks = tl.num_programs(0)
    group, state, own, d = _lanes(dim, S, NS)
    a2 = load_matrix(A + k * dim * states, group, state, dim, states, LOG2E, NS)
    none = tl.zeros([32], tl.float32)
    bias = _per_channel(dt_bias, k, dim, d, HAS_BIAS)
    skip = _per_channel(D, k, dim, d, HAS_D)
    begin, last, _end = _segment(lengths, b, length, segment_length, HAS_SEQ)
    g = zeros(4 * NS)
    if HAS_DFINAL:
        g = load_matrix(dfinal + row * dim * states, group, state, dim, states, 1.0, NS)
    if HAS_PARTS:
        later = (row * segments + segments - 1) * blocks + tl.program_id(0)
        count = segments - 1 - tl.program_id(1)
        g = fold(g, parts + later * (4 * NS * 32), spans + later * 32, a2, count, -blocks, S, NS)
    x += b * x_b + k * x_k + d
    dt += b * dt_b + k * dt_k + d
    B += b * B_b + k * B_k + state
    C += b * C_b + k * C_k + state
    dy += b * dy_b + d
    out = row * length * dim + own
    work += row * length * dim + d
    dx += out
    ddt += out
    dBC += part_row(row, blocks) * length * (2 * states)
    if HAS_Z:
        z += b * z_b + d
    dA_sum = zeros(4 * NS)
    dbias_sum = none
    first = begin + (tl.cdiv(last - begin, T) - 1) * T
    at = _steps(first, last, length, orders, k, height, width, T, GRID, WHOLE)
    x_raw, dt_raw, dy_raw, z_raw = _fetch_group(x, dt, dy, z, at, x_l, dt_l, dy_l, z_l, T, HAS_Z)
    w_raw = fetch(work, dim, at, T)
    first_chunk, behind_chunk = begin // CHUNK, tl.cdiv(last, CHUNK)
    for back_chunk in range(first_chunk, behind_chunk):
        chunk = first_chunk + behind_chunk - 1 - back_chunk
        chunk_last = tl.minimum(chunk * CHUNK + CHUNK, last)
        behind = (row * chunks + chunk + 1) * blocks + tl.program_id(0)
        q = _sum_with_matrix(g, load_values(saved + behind * (4 * NS * 32), NS), a2, S, NS)
        slope = load_values(slopes + (behind - blocks) * (4 * NS * 32), NS)
        dA_sum = _add_products(dA_sum, g, slope)
        resets = _resets(seq_idx, b * length, chunk * CHUNK, last, CHUNK, HAS_SEQ)
        groups = tl.cdiv(chunk_last - chunk * CHUNK, T)
        for back in range(groups):
            first = chunk * CHUNK + (groups - 1 - back) * T
            before_at = _steps(tl.maximum(first - T, begin), last, length, orders, k, height, width, T, GRID, WHOLE)
            x_next, dt_next, dy_next, z_next = _fetch_group(x, dt, dy, z, before_at, x_l, dt_l, dy_l, z_l, T, HAS_Z)
            w_next = fetch(work, dim, before_at, T)
            B_raw = fetch_states(B, B_l, at, states - state, T, NS, PACKED)
            C_raw = fetch_states(C, C_l, at, states - state, T, NS, PACKED)
            sizes, before = _step_sizes(dt_raw, bias, first, last, T, SOFTPLUS, WHOLE)
            for j in tl.static_range(T - 1, -1, -1):
                valid = WHOLE | (first + j < last)
                inside = (own < dim) & valid
                x_t, dt_t = x_raw[j].to(tl.float32), sizes[j]
                dy_t = tl.where(inside, dy_raw[j].to(tl.float32), 0.0)
                if HAS_Z:
                    z_t = z_raw[j].to(tl.float32)
                    dy_t *= z_t * sigmoid(z_t)
                w_t = tl.where(valid, w_raw[j], 0.0)
                B_t = unpack(B_raw[j], B.dtype.element_ty, PACKED)
                C_t = unpack(C_raw[j], C.dtype.element_ty, PACKED)
                g, q, share, dx_t, ddt_t = _step_back(g, q, a2, x_t, dt_t, dy_t, w_t, B_t, C_t, S, NS)
                _store_share(dBC + at[j] * (2 * states), share, states, valid, S, NS)
                if SOFTPLUS:
                    ddt_t *= sigmoid(before[j])
                dbias_sum += tl.where(inside, ddt_t, 0.0)
                tl.store(dx + at[j] * dim, (dx_t + skip * dy_t).to(dx.dtype.element_ty), mask=inside)
                tl.store(ddt + at[j] * dim, ddt_t.to(ddt.dtype.element_ty), mask=inside)
                g = decayed(g, a2, spread(dt_t, S), NS)
                if HAS_SEQ:
                    reset = _is_in(resets, first - chunk * CHUNK + j)
                    g = keep_unless(reset, g)
                    q = tl.where(reset, 0.0, q)
            at = before_at
            x_raw, dt_raw, dy_raw, w_raw, z_raw = x_next, dt_next, dy_next, w_next, z_next
    if HAS_SEQ:
        for step in range(tl.maximum(begin, last), tl.minimum(begin + segment_length, length)):
            _store_share(dBC + step * (2 * states), over_groups(zeros(NS), S), states, True, S, NS)
            tl.store(dx + step * dim, tl.zeros([32], dx.dtype.element_ty), mask=own < dim)
            tl.store(ddt + step * dim, tl.zeros([32], ddt.dtype.element_ty), mask=own < dim)
    per_segment = row * segments + tl.program_id(1)
    store_matrix(dA + per_segment * dim * states, dA_sum, group, state, dim, states, NS)
    if HAS_BIAS:
        tl.store(dbias + per_segment * dim + own, dbias_sum, mask=own < dim)
    if HAS_DINITIAL:
        if tl.program_id(1) == 0:
            store_matrix(dinitial + row * dim * states, g, group, state, dim, states, NS)


@triton.jit
def _step_back(g, q, a2, x_t, dt_t, dy_t, w_t, B_t, C_t, S: tl.constexpr, NS: tl.constexpr):
    """(g and q with this step's own part, the group's share of dB, and the own channel's dx and d dt)."""
    g = _add_output_grad(g, dy_t, C_t, S, NS)
    share = over_groups(_weighted(g, dt_t * x_t, S, NS), S)
    gB, gBA = _products(g, B_t, a2, S, NS)
    q += w_t - dt_t * x_t * gBA
    return g, q, share, dt_t * gB, q * (1.0 / LOG2E) + x_t * gB


@triton.jit
def part_row(row, blocks):
    """Row of this block of channels in the partial sums over channels."""
    return row * blocks + tl.program_id(0)


@triton.jit
def _weighted(values, weight, S: tl.constexpr, NS: tl.constexpr):
    """Sum over the group's 4 channels of each state's value times the channel's weight: NS values."""
    weights = spread(weight, S)
    sums = ()
    for j in tl.static_range(NS):
        total = values[j] * weights[0]
        for i in tl.static_range(1, 4):
            total += values[i * NS + j] * weights[i]
        sums = sums + (total,)
    return sums


@triton.jit
def _store_share(pointer, share, states, valid, S: tl.constexpr, NS: tl.constexpr):
    """Write a lane's share of a sum over groups into the row of one step."""
    lane = tl.arange(0, 32)
    for r in tl.static_range(len(share)):
        n = lane % S * NS + (lane // S) * NS // (32 // S) + r
        tl.store(pointer + n, share[r], mask=(n < states) & valid)


@triton.jit
def _products(values, factors, a2, S: tl.constexpr, NS: tl.constexpr):
    """Own channel's sum over states of values times factors, and the same with A log2(e)."""
    plain = ()
    scaled = ()
    for i in tl.static_range(4):
        total = values[i * NS] * factors[0]
        with_A = total * a2[i * NS]
        for j in tl.static_range(1, NS):
            product = values[i * NS + j] * factors[j]
            total += product
            with_A += product * a2[i * NS + j]
        plain = plain + (total,)
        scaled = scaled + (with_A,)
    return own_total(plain, S), own_total(scaled, S)


@triton.jit
def _sum_with_matrix(values, factors, a2, S: tl.constexpr, NS: tl.constexpr):
    """Own channel's sum over states of values times factors times A log2(e); a factor for each value."""
    scaled = ()
    for i in tl.static_range(4):
        total = values[i * NS] * factors[i * NS] * a2[i * NS]
        for e in tl.static_range(i * NS + 1, i * NS + NS):
            total += values[e] * factors[e] * a2[e]
        scaled = scaled + (total,)
    return own_total(scaled, S)


@triton.jit
def _add_products(sums, values, factors):
    """sums + values times factors."""
    added = ()
    for e in tl.static_range(len(sums)):
        added = added + (sums[e] + values[e] * factors[e],)
    return added


@triton.jit
def _add_weighted(sums, values, weight, factors, S: tl.constexpr, NS: tl.constexpr):
    """sums + values times the channel's weight times the state's factor."""
    weights = spread(weight, S)
    added = ()
    for e in tl.static_range(4 * NS):
        added = added + (sums[e] + values[e] * factors[e % NS] * weights[e // NS],)
    return added
