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
    is_reset,
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
def _lanes(states, dim, S: tl.constexpr, NS: tl.constexpr):
    """(first channel of the lane's group, first state of the lane, the lane's own channel)."""
    lane = tl.arange(0, 32)
    group = tl.program_id(0) * (128 // S) + lane // S * 4
    return group, lane % S * NS, group + (lane & 3)


@triton.jit
def _step_sizes(raw, bias, first, last, T: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Own channel's dt at T steps, 0 from `last` on (the state stays), and what stood before the softplus."""
    sizes = ()
    before = ()
    for j in tl.static_range(T):
        v = raw[j].to(tl.float32) + bias
        size = softplus(v) if SOFTPLUS else v
        sizes = sizes + (tl.where(first + j < last, size, 0.0),)
        before = before + (v,)
    return sizes, before


@triton.jit
def _advance(h, a2, dt_t, dtx_t, B_t, S: tl.constexpr, NS: tl.constexpr):
    """One step: h = exp(dt A) h + dt x B."""
    dts, dtxs = spread(dt_t, S), spread(dtx_t, S)
    after = ()
    for e in tl.static_range(4 * NS):
        after = after + (tl.exp2(dts[e // NS] * a2[e]) * h[e] + dtxs[e // NS] * B_t[e % NS],)
    return after


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
def segment_kernel(
    x, dt, A, B, dt_bias, seq_idx, lengths, parts, spans,
    length, dim, states, rows_k, orders, height, width, segment_length, segments,
    x_b, x_k, x_l, dt_b, dt_k, dt_l, B_b, B_k, B_l,
    T: tl.constexpr, S: tl.constexpr, NS: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state, beginning from zero, and its sum of dt."""
    row = tl.program_id(2).to(tl.int64)
    b, k = row // rows_k, row % rows_k
    group, state, own = _lanes(states, dim, S, NS)
    d = tl.minimum(own, dim - 1)
    a2 = load_matrix(A + k * dim * states, group, state, dim, states, LOG2E, NS)
    bias = tl.load(dt_bias + k * dim + d) if HAS_BIAS else tl.zeros([32], tl.float32)
    end = tl.load(lengths + b) if HAS_SEQ else length
    begin = tl.program_id(1) * segment_length
    last = tl.minimum(begin + segment_length, end)
    x += b * x_b + k * x_k + d
    dt += b * dt_b + k * dt_k + d
    B += b * B_b + k * B_k + state
    h = zeros(4 * NS)
    span = tl.zeros([32], tl.float32)
    at = places(begin, last, length, orders, k, height, width, T, GRID)
    x_raw, dt_raw, B_raw = (
        fetch(x, x_l, at, T),
        fetch(dt, dt_l, at, T),
        fetch_states(B, B_l, at, states - state, T, NS, PACKED),
    )
    for first in range(begin, last, T):
        at = places(first + T, last, length, orders, k, height, width, T, GRID)
        x_next, dt_next = fetch(x, x_l, at, T), fetch(dt, dt_l, at, T)
        B_next = fetch_states(B, B_l, at, states - state, T, NS, PACKED)
        sizes, _ = _step_sizes(dt_raw, bias, first, last, T, SOFTPLUS)
        for j in tl.static_range(T):
            if HAS_SEQ:
                reset = (first + j < last) & is_reset(seq_idx, b * length, tl.minimum(first + j, last - 1))
                h = keep_unless(reset, h)
                span = tl.where(reset, float("nan"), span)
            span += sizes[j]
            B_t = unpack(B_raw[j], B.dtype.element_ty, PACKED)
            h = _advance(h, a2, sizes[j], sizes[j] * x_raw[j].to(tl.float32), B_t, S, NS)
        x_raw, dt_raw, B_raw = x_next, dt_next, B_next
    part = (row * segments + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    store_values(parts + part * (4 * NS * 32), h)
    tl.store(spans + part * 32 + tl.arange(0, 32), span)


@triton.jit
def forward_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, lengths, parts, spans, y, final, saved,
    length, dim, states, rows_k, orders, height, width, segment_length, segments, chunks,
    x_b, x_k, x_l, dt_b, dt_k, dt_l, B_b, B_k, B_l, C_b, C_k, C_l, z_b, z_l,
    CHUNK: tl.constexpr, T: tl.constexpr, S: tl.constexpr, NS: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    PACKED: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_SEQ: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    b, k = row // rows_k, row % rows_k
    blocks = tl.num_programs(0)
    group, state, own = _lanes(states, dim, S, NS)
    d = tl.minimum(own, dim - 1)
    a2 = load_matrix(A + k * dim * states, group, state, dim, states, LOG2E, NS)
    bias = tl.load(dt_bias + k * dim + d) if HAS_BIAS else tl.zeros([32], tl.float32)
    skip = tl.load(D + k * dim + d) if HAS_D else tl.zeros([32], tl.float32)
    h = zeros(4 * NS)
    if HAS_INITIAL:
        h = load_matrix(initial + row * dim * states, group, state, dim, states, 1.0, NS)
    if HAS_PARTS:
        part = row * segments * blocks + tl.program_id(0)
        h = fold(h, parts + part * (4 * NS * 32), spans + part * 32, a2, tl.program_id(1), blocks, S, NS)
    end = tl.load(lengths + b) if HAS_SEQ else length
    begin = tl.program_id(1) * segment_length
    last = tl.minimum(begin + segment_length, end)
    x += b * x_b + k * x_k + d
    dt += b * dt_b + k * dt_k + d
    B += b * B_b + k * B_k + state
    C += b * C_b + k * C_k + state
    y += row * length * dim + own
    at = places(begin, last, length, orders, k, height, width, T, GRID)
    x_raw, dt_raw, z_raw = fetch(x, x_l, at, T), fetch(dt, dt_l, at, T), ()
    B_raw = fetch_states(B, B_l, at, states - state, T, NS, PACKED)
    C_raw = fetch_states(C, C_l, at, states - state, T, NS, PACKED)
    if HAS_Z:
        z += b * z_b + d
        z_raw = fetch(z, z_l, at, T)
    for chunk_first in range(begin, last, CHUNK):
        chunk = (row * chunks + chunk_first // CHUNK) * blocks + tl.program_id(0)
        store_values(saved + chunk * (4 * NS * 32), h)
        for first in range(chunk_first, tl.minimum(chunk_first + CHUNK, last), T):
            next_at = places(first + T, last, length, orders, k, height, width, T, GRID)
            x_next, dt_next, z_next = fetch(x, x_l, next_at, T), fetch(dt, dt_l, next_at, T), ()
            B_next = fetch_states(B, B_l, next_at, states - state, T, NS, PACKED)
            C_next = fetch_states(C, C_l, next_at, states - state, T, NS, PACKED)
            if HAS_Z:
                z_next = fetch(z, z_l, next_at, T)
            sizes, _ = _step_sizes(dt_raw, bias, first, last, T, SOFTPLUS)
            ys = ()
            for j in tl.static_range(T):
                if HAS_SEQ:
                    h = keep_unless(
                        (first + j < last) & is_reset(seq_idx, b * length, tl.minimum(first + j, last - 1)), h
                    )
                x_t = x_raw[j].to(tl.float32)
                h = _advance(h, a2, sizes[j], sizes[j] * x_t, unpack(B_raw[j], B.dtype.element_ty, PACKED), S, NS)
                y_t = _read_out(h, unpack(C_raw[j], C.dtype.element_ty, PACKED), S, NS) + skip * x_t
                if HAS_Z:
                    z_t = z_raw[j].to(tl.float32)
                    y_t *= z_t * sigmoid(z_t)
                ys = ys + (y_t,)
            for j in tl.static_range(T):
                tl.store(y + at[j] * dim, ys[j].to(y.dtype.element_ty), mask=(own < dim) & (first + j < last))
            at, x_raw, dt_raw, z_raw, B_raw, C_raw = next_at, x_next, dt_next, z_next, B_next, C_next
    if HAS_FINAL:
        if tl.program_id(1) == tl.maximum(end - 1, 0) // segment_length:
            store_matrix(final + row * dim * states, h, group, state, dim, states, NS)


@triton.jit
def segment_grad_kernel(
    dy, dt, A, C, z, dt_bias, seq_idx, lengths, parts, spans,
    length, dim, states, rows_k, orders, height, width, segment_length, segments,
    dy_b, dy_l, dt_b, dt_k, dt_l, C_b, C_k, C_l, z_b, z_l,
    T: tl.constexpr, S: tl.constexpr, NS: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    PACKED: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the gradient of the state before it, and its sum of dt."""
    row = tl.program_id(2).to(tl.int64)
    b, k = row // rows_k, row % rows_k
    group, state, own = _lanes(states, dim, S, NS)
    d = tl.minimum(own, dim - 1)
    a2 = load_matrix(A + k * dim * states, group, state, dim, states, LOG2E, NS)
    bias = tl.load(dt_bias + k * dim + d) if HAS_BIAS else tl.zeros([32], tl.float32)
    end = tl.load(lengths + b) if HAS_SEQ else length
    begin = tl.program_id(1) * segment_length
    last = tl.minimum(begin + segment_length, end)
    dy += b * dy_b + d
    dt += b * dt_b + k * dt_k + d
    C += b * C_b + k * C_k + state
    g = zeros(4 * NS)
    span = tl.zeros([32], tl.float32)
    for back in range(0, tl.cdiv(last - begin, T)):
        first = begin + (tl.cdiv(last - begin, T) - 1 - back) * T
        at = places(first, last, length, orders, k, height, width, T, GRID)
        dy_raw, dt_raw = fetch(dy, dy_l, at, T), fetch(dt, dt_l, at, T)
        C_raw = fetch_states(C, C_l, at, states - state, T, NS, PACKED)
        if HAS_Z:
            z_raw = fetch(z + b * z_b + d, z_l, at, T)
        sizes, _ = _step_sizes(dt_raw, bias, first, last, T, SOFTPLUS)
        for j in tl.static_range(T - 1, -1, -1):
            dy_t = tl.where((own < dim) & (first + j < last), dy_raw[j].to(tl.float32), 0.0)
            if HAS_Z:
                z_t = z_raw[j].to(tl.float32)
                dy_t *= z_t * sigmoid(z_t)
            g = _add_output_grad(g, dy_t, unpack(C_raw[j], C.dtype.element_ty, PACKED), S, NS)
            g = decayed(g, a2, spread(sizes[j], S), NS)
            span += sizes[j]
            if HAS_SEQ:
                reset = (first + j < last) & is_reset(seq_idx, b * length, tl.minimum(first + j, last - 1))
                g = keep_unless(reset, g)
                span = tl.where(reset, float("nan"), span)
    part = (row * segments + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    store_values(parts + part * (4 * NS * 32), g)
    tl.store(spans + part * 32 + tl.arange(0, 32), span)


@triton.jit
def _add_output_grad(g, dy_t, C_t, S: tl.constexpr, NS: tl.constexpr):
    """g + dy C, the gradient that reaches the state through its own output."""
    dys = spread(dy_t, S)
    total = ()
    for e in tl.static_range(4 * NS):
        total = total + (g[e] + dys[e // NS] * C_t[e % NS],)
    return total


@triton.jit
def backward_kernel(
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, seq_idx, lengths, saved, scratch, parts, spans,
    dx, ddt, dA, dBC, dD, dz, dbias, dinitial,
    length, dim, states, rows_k, orders, height, width, segment_length, segments, chunks,
    dy_b, dy_l, x_b, x_k, x_l, dt_b, dt_k, dt_l, B_b, B_k, B_l, C_b, C_k, C_l, z_b, z_l,
    CHUNK: tl.constexpr, T: tl.constexpr, S: tl.constexpr, NS: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    PACKED: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr, HAS_PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2).to(tl.int64)
    b, k = row // rows_k, row % rows_k
    blocks = tl.num_programs(0)
    part = (row * segments + tl.program_id(1)) * blocks + tl.program_id(0)
    group, state, own = _lanes(states, dim, S, NS)
    d = tl.minimum(own, dim - 1)
    a2 = load_matrix(A + k * dim * states, group, state, dim, states, LOG2E, NS)
    bias = tl.load(dt_bias + k * dim + d) if HAS_BIAS else tl.zeros([32], tl.float32)
    skip = tl.load(D + k * dim + d) if HAS_D else tl.zeros([32], tl.float32)
    end = tl.load(lengths + b) if HAS_SEQ else length
    begin = tl.program_id(1) * segment_length
    last = tl.minimum(begin + segment_length, end)
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
    scratch += part * (CHUNK // T) * (4 * NS * 32)
    dA_sum = zeros(4 * NS)
    dD_sum = tl.zeros([32], tl.float32)
    dbias_sum = tl.zeros([32], tl.float32)
    first_chunk, behind_chunk = begin // CHUNK, tl.cdiv(last, CHUNK)
    for back_chunk in range(first_chunk, behind_chunk):
        chunk = first_chunk + behind_chunk - 1 - back_chunk
        chunk_last = tl.minimum(chunk * CHUNK + CHUNK, last)
        h = load_values(saved + ((row * chunks + chunk) * blocks + tl.program_id(0)) * (4 * NS * 32), 4 * NS)
        store_values(scratch, h)
        for first in range(chunk * CHUNK, chunk_last - T, T):  # the states at the start of every T steps
            at = places(first, chunk_last, length, orders, k, height, width, T, GRID)
            x_raw, dt_raw = fetch(x, x_l, at, T), fetch(dt, dt_l, at, T)
            B_raw = fetch_states(B, B_l, at, states - state, T, NS, PACKED)
            sizes, _ = _step_sizes(dt_raw, bias, first, chunk_last, T, SOFTPLUS)
            for j in tl.static_range(T):
                if HAS_SEQ:
                    h = keep_unless(is_reset(seq_idx, b * length, first + j), h)
                B_t = unpack(B_raw[j], B.dtype.element_ty, PACKED)
                h = _advance(h, a2, sizes[j], sizes[j] * x_raw[j].to(tl.float32), B_t, S, NS)
            store_values(scratch + (first % CHUNK // T + 1) * (4 * NS * 32), h)
        tl.debug_barrier()
        for back in range(0, tl.cdiv(chunk_last - chunk * CHUNK, T)):
            first = chunk * CHUNK + (tl.cdiv(chunk_last - chunk * CHUNK, T) - 1 - back) * T
            at = places(first, chunk_last, length, orders, k, height, width, T, GRID)
            x_raw, dt_raw, dy_raw = fetch(x, x_l, at, T), fetch(dt, dt_l, at, T), fetch(dy, dy_l, at, T)
            B_raw = fetch_states(B, B_l, at, states - state, T, NS, PACKED)
            C_raw = fetch_states(C, C_l, at, states - state, T, NS, PACKED)
            if HAS_Z:
                z_raw = fetch(z + b * z_b + d, z_l, at, T)
            h = load_values(scratch + (first % CHUNK // T) * (4 * NS * 32), 4 * NS)
            sizes, before = _step_sizes(dt_raw, bias, first, chunk_last, T, SOFTPLUS)
            trail = ()  # the state before each step, and after the last one
            for j in tl.static_range(T):
                if HAS_SEQ:
                    step = tl.minimum(first + j, chunk_last - 1)
                    h = keep_unless((first + j < chunk_last) & is_reset(seq_idx, b * length, step), h)
                trail = trail + (h,)
                B_t = unpack(B_raw[j], B.dtype.element_ty, PACKED)
                h = _advance(h, a2, sizes[j], sizes[j] * x_raw[j].to(tl.float32), B_t, S, NS)
            for j in tl.static_range(T - 1, -1, -1):
                valid = first + j < chunk_last
                inside = (own < dim) & valid
                x_t, dt_t = x_raw[j].to(tl.float32), sizes[j]
                dy_t = tl.where(inside, dy_raw[j].to(tl.float32), 0.0)
                B_t, C_t = unpack(B_raw[j], B.dtype.element_ty, PACKED), unpack(C_raw[j], C.dtype.element_ty, PACKED)
                if HAS_SEQ:  # what the next sequence dropped is not what this step left
                    h = _advance(trail[j], a2, dt_t, dt_t * x_t, B_t, S, NS)
                if HAS_Z:
                    z_t = z_raw[j].to(tl.float32)
                    gate = sigmoid(z_t)
                    dz_t = dy_t * (_read_out(h, C_t, S, NS) + skip * x_t) * gate * (1.0 + z_t * (1.0 - gate))
                    tl.store(dz + b * length * dim + at[j] * dim + own, dz_t.to(dz.dtype.element_ty), mask=inside)
                    dy_t *= z_t * gate
                g = _add_output_grad(g, dy_t, C_t, S, NS)
                share = over_groups(_matrix_grads(g, h, dt_t * x_t, dy_t, S, NS), S)
                _store_matrix_grads(
                    dBC + (part_row(row, blocks) * length + at[j]) * (2 * states), share, states, valid, S, NS
                )
                g, dA_sum, gB, qA = _step_back(g, trail[j], dA_sum, a2, dt_t, B_t, S, NS)
                ddt_t = qA + x_t * gB
                if SOFTPLUS:
                    ddt_t *= sigmoid(before[j])
                dbias_sum += tl.where(valid, ddt_t, 0.0)
                dD_sum += dy_t * x_t
                tl.store(dx + out + at[j] * dim, (dt_t * gB + skip * dy_t).to(dx.dtype.element_ty), mask=inside)
                tl.store(ddt + out + at[j] * dim, ddt_t.to(ddt.dtype.element_ty), mask=inside)
                if HAS_SEQ:
                    g = keep_unless(valid & is_reset(seq_idx, b * length, tl.minimum(first + j, chunk_last - 1)), g)
                h = trail[j]
        tl.debug_barrier()
    per_segment = row * segments + tl.program_id(1)
    store_matrix(dA + per_segment * dim * states, dA_sum, group, state, dim, states, NS)
    if HAS_D:
        tl.store(dD + per_segment * dim + own, dD_sum, mask=own < dim)
    if HAS_BIAS:
        tl.store(dbias + per_segment * dim + own, dbias_sum, mask=own < dim)
    if HAS_DINITIAL:
        if tl.program_id(1) == 0:
            store_matrix(dinitial + row * dim * states, g, group, state, dim, states, NS)


@triton.jit
def part_row(row, blocks):
    """Row of this block of channels in the partial sums over channels."""
    return row * blocks + tl.program_id(0)


@triton.jit
def _matrix_grads(g, h, dtx_t, dy_t, S: tl.constexpr, NS: tl.constexpr):
    """The group's share of dB (NS values), then of dC."""
    dtxs, dys = spread(dtx_t, S), spread(dy_t, S)
    dB = ()
    dC = ()
    for j in tl.static_range(NS):
        b, c = g[j] * dtxs[0], h[j] * dys[0]
        for i in tl.static_range(1, 4):
            b += g[i * NS + j] * dtxs[i]
            c += h[i * NS + j] * dys[i]
        dB = dB + (b,)
        dC = dC + (c,)
    return dB + dC


@triton.jit
def _store_matrix_grads(pointer, share, states, valid, S: tl.constexpr, NS: tl.constexpr):
    """Write a lane's share of dB and dC of one step into its row of 2 N values."""
    lane = tl.arange(0, 32)
    for r in tl.static_range(len(share)):
        index = (lane // S) * (2 * NS) // (32 // S) + r
        n = lane % S * NS + index % NS
        tl.store(pointer + tl.where(index < NS, n, states + n), share[r], mask=(n < states) & valid)


@triton.jit
def _step_back(g, h_before, dA_sum, a2, dt_t, B_t, S: tl.constexpr, NS: tl.constexpr):
    """Carry g over one step. Gives (g, dA's sum, own channel's g . B, own channel's g exp(dt A) h_before . A)."""
    dts = spread(dt_t, S)
    carried = ()
    sums = ()
    gBs = ()
    qAs = ()
    for i in tl.static_range(4):
        gB = g[i * NS] * B_t[0]
        for j in tl.static_range(1, NS):
            gB += g[i * NS + j] * B_t[j]
        gBs = gBs + (gB,)
        qA = tl.zeros([32], tl.float32)
        for e in tl.static_range(i * NS, i * NS + NS):
            g_before = tl.exp2(dts[i] * a2[e]) * g[e]
            carried = carried + (g_before,)
            q = g_before * h_before[e]
            qA += q * a2[e]
            sums = sums + (dA_sum[e] + q * dts[i],)
        qAs = qAs + (qA,)
    return carried, sums, own_total(gBs, S), own_total(qAs, S) * (1.0 / LOG2E)
