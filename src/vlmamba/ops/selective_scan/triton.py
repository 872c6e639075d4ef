"""Selective scan on the GPU, in Triton: forward and backward of Mamba's recurrence, over a sequence or over a grid of patches.

One set of kernels serves both: a row is a sequence (K = 1) or one order of one image, and `position` says where in memory its
step t stands. A program is one warp that walks a segment of a row for 128 / S channels (`vlmamba.ops.lanes` says how its lanes
share them). Where rows and channels are too few to fill the GPU, a row is cut into segments: a first pass finds what each
segment adds to the state, and the main pass begins by folding what the segments before it added. The forward pass saves the
state every CHUNK steps; the backward pass recomputes the rest. Every sum over programs goes through partial results in
memory and a second pass, so two runs agree bit for bit.

Letters: B batch, K scan orders, R = B * K rows, L length (or patches), D channels, N state size, C saved chunks, G segments,
J blocks of channels, S lanes of a group of 4 channels, NS states of a lane, T steps done together.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmamba.ops.lanes import (
    LOG2E, add_across, decayed, fetch, fetch_states, fold, is_reset, keep_unless, load_matrix, load_values, over_groups,
    own_total, places, sigmoid, softplus, spread, store_matrix, store_values, unpack, zeros,
)  # fmt: skip

T = 4  # steps done together in forward: their loads are in flight while the steps before are computed
T_BACK = 2  # the same in backward, which holds the states of these steps in registers: 4 of them spill
CHUNK = 32  # steps between two saved states
ROUNDS = 2  # warps that each of a multiprocessor's four schedulers should have before a row is left whole
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
def _segment_kernel(
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
    x_raw, dt_raw, B_raw = fetch(x, x_l, at, T), fetch(dt, dt_l, at, T), fetch_states(B, B_l, at, states - state, T, NS, PACKED)
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
def _forward_kernel(
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
                    h = keep_unless((first + j < last) & is_reset(seq_idx, b * length, tl.minimum(first + j, last - 1)), h)
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
def _segment_grad_kernel(
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
def _backward_kernel(
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
                _store_matrix_grads(dBC + (part_row(row, blocks) * length + at[j]) * (2 * states), share, states, valid, S, NS)
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


def row_major(t: Tensor) -> Tensor:
    """The kernels take any outer strides, but the last dimension must be contiguous: copy where it is not."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def check(op: str, *, on_gpu: bool = True, **tensors: Tensor | None) -> None:
    """Raise ValueError for what the kernels cannot take: another dtype, or a tensor off the GPU outside the interpreter."""
    for name, t in tensors.items():
        if t is None:
            continue
        if name in ("slots", "seq_idx"):
            if t.is_floating_point():
                raise ValueError(f"{op}: {name} holds {t.dtype}; expected integers")
        elif t.dtype not in DTYPES:
            raise ValueError(
                f"{op}: {name} is {t.dtype}, but the Triton kernels take float32, bfloat16 and float16; convert it or pass "
                'implementation="reference"'
            )
        if on_gpu and not t.is_cuda and not triton.knobs.runtime.interpret:
            raise ValueError(
                f'{op}: {name} is on {t.device}, but the Triton kernels need a GPU; move it or pass implementation="reference"'
            )


def valid_lengths(seq_idx: Tensor | None) -> Tensor | None:
    """(B,) int32: positions of each row before its padding, which is marked by negative values and stands at the end."""
    return None if seq_idx is None else (seq_idx >= 0).sum(-1, dtype=torch.int32)


def lanes_of(N: int) -> tuple[int, int]:
    """(S, NS): lanes that share a group of 4 channels, and the states of each."""
    NS = 2 if N <= 8 else 4
    return max(4, triton.next_power_of_2(N) // NS), NS


def lanes_of(N: int) -> tuple[int, int]:
    """(S, NS): lanes that share a group of 4 channels, and the states of each."""
    NS = 2 if N <= 8 else 4
    return max(4, triton.next_power_of_2(N) // NS), NS


def lanes_of(N: int) -> tuple[int, int]:
    """(S, NS): lanes that share a group of 4 channels, and the states of each."""
    NS = 2 if N <= 8 else 4
    return max(4, triton.next_power_of_2(N) // NS), NS


def lanes_of(N: int) -> tuple[int, int]:
    """(S, NS): lanes that share a group of 4 channels, and the states of each."""
    NS = 2 if N <= 8 else 4
    return max(4, triton.next_power_of_2(N) // NS), NS


def saved_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the third output of `forward`: the states every CHUNK steps, in the kernels' own layout."""
    S, NS = lanes_of(states)
    return (batch, 1, triton.cdiv(length, CHUNK), triton.cdiv(channels, 128 // S), 4 * NS, 32)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter 2, so that small cases are cut into segments too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def segment_length(programs: int, length: int, device: torch.device) -> int:
    """Steps of a segment, a multiple of CHUNK: the row whole if `programs` warps fill the GPU, else cut so that they do."""
    segments = max(1, ROUNDS * 4 * multiprocessors(device) // max(programs, 1))
    return triton.cdiv(triton.cdiv(length, segments), CHUNK) * CHUNK


def _strides(t: Tensor | None) -> tuple[int, int, int]:
    """(batch, order, step) strides of (B, K, L, *)."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(2))


def _outer(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


def _is_packed(N: int, NS: int, S: int, *matrices: Tensor) -> bool:
    """Whether every lane's NS values of B and C stand on boundaries of their own size (at most 8 bytes)."""
    words = (min(8, NS * t.element_size()) for t in matrices)
    aligned = (
        t.data_ptr() % word == 0 and all(stride * t.element_size() % word == 0 for stride in t.stride()[:-1])
        for t, word in zip(matrices, words)
    )
    return S * NS == N and all(aligned)


def _output(like: Tensor, shape: tuple[int, ...], padded: bool) -> Tensor:
    """Padded positions are never visited, so there the output begins at zero."""
    make = torch.zeros if padded else torch.empty
    return make(shape, dtype=like.dtype, device=like.device)


def scan_rows(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, initial: Tensor | None, seq_idx: Tensor | None, return_final: bool,
    grid: tuple[int, int] = (0, 0), orders: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scan K orders of B rows: x, dt (B, K, L, D), B, C (B, K, L, N), A (K, D, N), D, dt_bias (K, D), z (B, L, D);
    states (B, K, D, N). Gives y (B, K, L, D), the final state (empty unless asked for) and the states the backward needs."""
    batch, K, length, dim = x.shape
    N = B.shape[-1]
    S, NS = lanes_of(N)
    x, dt, B, C, A = row_major(x), row_major(dt), row_major(B), row_major(C), A.contiguous()
    z = z if z is None else row_major(z)
    blocks, rows = triton.cdiv(dim, 128 // S), batch * K
    y = _output(x, (batch, K, length, dim), seq_idx is not None)
    saved = torch.empty((batch, K, *saved_shape(1, length, dim, N)[2:]), dtype=torch.float32, device=x.device)
    final = torch.empty((batch, K, dim, N) if return_final else (0,), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return y, final if initial is None or not return_final else final.copy_(initial), saved
    steps = segment_length(blocks * rows, length, x.device)
    segments = triton.cdiv(length, steps)
    parts = spans = None
    lengths = valid_lengths(seq_idx)
    shape = (length, dim, N, K, orders, *grid, steps, segments)
    flags = dict(T=T, S=S, NS=NS, SOFTPLUS=softplus, GRID=grid != (0, 0), HAS_BIAS=dt_bias is not None,
                 HAS_SEQ=seq_idx is not None, PACKED=_is_packed(N, NS, S, B, C), num_warps=1)  # fmt: skip
    if segments > 1:
        parts, spans = _segment_buffers(rows, segments, blocks, NS, x.device)
        _segment_kernel[(blocks, segments - 1, rows)](
            x, dt, A, B, dt_bias, seq_idx, lengths, parts, spans, *shape, *_strides(x), *_strides(dt), *_strides(B), **flags
        )
    _forward_kernel[(blocks, segments, rows)](
        x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, lengths, parts, spans, y, final, saved, *shape, saved.shape[2],
        *_strides(x), *_strides(dt), *_strides(B), *_strides(C), *_outer(z),
        CHUNK=CHUNK, HAS_D=D is not None, HAS_Z=z is not None, HAS_INITIAL=initial is not None, HAS_FINAL=return_final,
        HAS_PARTS=segments > 1, **flags,
    )  # fmt: skip
    return y, final, saved


def _segment_buffers(rows: int, segments: int, blocks: int, NS: int, device: torch.device) -> tuple[Tensor, Tensor]:
    parts = torch.empty((rows, segments, blocks, 4 * NS, 32), dtype=torch.float32, device=device)
    return parts, torch.empty((rows, segments, blocks, 32), dtype=torch.float32, device=device)


def scan_rows_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, softplus: bool, needs_initial: bool, seq_idx: Tensor | None, saved: Tensor,
    grid: tuple[int, int] = (0, 0), orders: int = 0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of `scan_rows`. dy (B, L, D) is shared by the K orders; the gradients of x, dt, B, C come per order."""
    batch, K, length, dim = x.shape
    N = B.shape[-1]
    S, NS = lanes_of(N)
    dy, x, dt, B, C, A = row_major(dy), row_major(x), row_major(dt), row_major(B), row_major(C), A.contiguous()
    z = z if z is None else row_major(z)
    padded = seq_idx is not None
    blocks, rows = triton.cdiv(dim, 128 // S), batch * K
    steps = segment_length(blocks * rows, length, x.device) if length else CHUNK
    segments = triton.cdiv(length, steps)
    f32 = x.new_empty(0, dtype=torch.float32)
    dx, ddt = _output(x, (batch, K, length, dim), padded), _output(dt, (batch, K, length, dim), padded)
    dz = None if z is None else _output(z, (batch, length, dim), padded)
    dBC = _output(f32, (batch, K, blocks, length, 2 * N), padded)
    dA = f32.new_empty((batch, K, segments, dim, N))
    dD, dbias = (None if t is None else f32.new_empty((batch, K, segments, dim)) for t in (D, dt_bias))
    dinitial = None
    if needs_initial:
        dinitial = f32.new_empty((batch, K, dim, N)) if x.numel() else _no_steps(dfinal, f32, (batch, K, dim, N))
    if x.numel():
        parts = spans = None
        scratch = f32.new_empty((rows, segments, blocks, CHUNK // T_BACK, 4 * NS, 32))
        lengths = valid_lengths(seq_idx)
        shape = (length, dim, N, K, orders, *grid, steps, segments)
        flags = dict(T=T_BACK, S=S, NS=NS, SOFTPLUS=softplus, GRID=grid != (0, 0), HAS_Z=z is not None, HAS_BIAS=dt_bias is not None,
                     HAS_SEQ=padded, PACKED=_is_packed(N, NS, S, B, C), num_warps=1)  # fmt: skip
        if segments > 1:
            parts, spans = _segment_buffers(rows, segments, blocks, NS, x.device)
            _segment_grad_kernel[(blocks, segments, rows)](
                dy, dt, A, C, z, dt_bias, seq_idx, lengths, parts, spans, *shape, *_outer(dy), *_strides(dt), *_strides(C),
                *_outer(z), **flags,
            )  # fmt: skip
        _backward_kernel[(blocks, segments, rows)](
            dy, dfinal, x, dt, A, B, C, D, z, dt_bias, seq_idx, lengths, saved, scratch, parts, spans,
            dx, ddt, dA, dBC, dD, dz, dbias, dinitial, *shape, saved.shape[2],
            *_outer(dy), *_strides(x), *_strides(dt), *_strides(B), *_strides(C), *_outer(z),
            CHUNK=CHUNK, HAS_D=D is not None, HAS_DFINAL=dfinal is not None, HAS_DINITIAL=needs_initial,
            HAS_PARTS=segments > 1, **flags,
        )  # fmt: skip
    dB, dC = dBC.sum(2).split(N, -1)
    return (
        dx, ddt, dA.sum((0, 2)), dB.to(B.dtype), dC.to(C.dtype), None if dD is None else dD.sum((0, 2)), dz,
        None if dbias is None else dbias.sum((0, 2)), dinitial,
    )  # fmt: skip


def _no_steps(dfinal: Tensor | None, f32: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Gradient of the initial state of an empty sequence: that of the final state."""
    return f32.new_zeros(shape) if dfinal is None else dfinal.clone()


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, initial_state: Tensor | None, seq_idx: Tensor | None, return_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, dt, z (B, L, D), A (D, N), B, C (B, L, N), D, dt_bias (D,), initial_state (B, D, N), seq_idx (B, L) int32, negative
    for padding. Gives y (B, L, D), the final state (B, D, N) or an empty tensor, and the saved states for `backward`.
    Raises ValueError for a dtype or device that the kernels cannot take."""
    check(
        "selective_scan",
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_state=initial_state,
        seq_idx=seq_idx,
    )
    y, final, saved = scan_rows(
        x[:, None], dt[:, None], A[None], B[:, None], C[:, None], _vector(D), z, _vector(dt_bias), dt_softplus,
        _state(initial_state), _indices(seq_idx), return_final_state,
    )  # fmt: skip
    return y[:, 0], final[:, 0] if return_final_state else final, saved


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, seq_idx: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state) of `forward`; None where the input is None."""
    check("selective_scan", dy=dy, dfinal_state=dfinal_state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = scan_rows_backward(
        dy, _state(dfinal_state), x[:, None], dt[:, None], A[None], B[:, None], C[:, None], _vector(D), z, _vector(dt_bias),
        dt_softplus, initial_state is not None, _indices(seq_idx), saved,
    )  # fmt: skip
    assert dx is not None and ddt is not None and dA is not None and dB is not None and dC is not None
    return (
        dx[:, 0], ddt[:, 0], dA[0], dB[:, 0], dC[:, 0], None if dD is None else dD[0], dz,
        None if dbias is None else dbias[0], None if dinitial is None else dinitial[:, 0],
    )  # fmt: skip


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()[None]


def _state(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()[:, None]


def _indices(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
