"""The Triton kernels of sum and norm. `*_row` are strides of rows; a program of `norm_forward_kernel` has one row, one
of `norm_backward_kernel` walks ROWS rows and keeps the weight's gradient in registers: the partial gradients are summed
in a second pass, so two runs agree bit for bit."""

# mypy: ignore-errors
# ruff: noqa: RUF005
# (Triton's language looks like Python, but only its own compiler knows the types of its names; it has no starred
# tuples.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_forward_kernel(
    x, delta, weight, normed, summed, width, eps, x_row, delta_row, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < width
    v = tl.load(x + row * x_row + k, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        v += tl.load(delta + row * delta_row + k, mask=inside, other=0.0).to(tl.float32)
        stored = v.to(summed.dtype.element_ty)
        tl.store(summed + row * width + k, stored, mask=inside)
        v = stored.to(tl.float32)
    w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    v = v * tl.rsqrt(tl.sum(v * v, axis=0) / width + eps) * w
    tl.store(normed + row * width + k, v.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _load(row, width, live, PIECES: tl.constexpr, BLOCK: tl.constexpr):
    """A row in pieces of BLOCK, as it stands in memory; zeros beyond its end, or if not `live`."""
    pieces = ()
    for i in tl.static_range(PIECES):
        k = i * BLOCK + tl.arange(0, BLOCK)
        pieces = pieces + (tl.load(row + k, mask=(k < width) & live, other=0.0),)
    return pieces


@triton.jit
def _store(row, pieces, width, live, BLOCK: tl.constexpr):
    for i in tl.static_range(len(pieces)):
        k = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(row + k, pieces[i].to(row.dtype.element_ty), mask=(k < width) & live)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def norm_backward_kernel(
    dnormed, dsummed, summed, weight, dx, dweight, rows, width, eps, dn_row, ds_row, s_row, ROWS: tl.constexpr,
    PIECES: tl.constexpr, BLOCK: tl.constexpr, HAS_DSUMMED: tl.constexpr,
):  # fmt: skip
    """Pieces of four numbers a thread hold a row of any width without many idle registers, so that several programs
    stand on a multiprocessor and one loads while another sums."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    weights = _load(weight, width, True, PIECES, BLOCK)
    total = ()
    for _ in tl.static_range(PIECES):
        total = total + (tl.zeros([BLOCK], tl.float32),)
    for i in range(0, ROWS):
        row = first + i
        live = row < rows
        v = _load(summed + row * s_row, width, live, PIECES, BLOCK)
        g = _load(dnormed + row * dn_row, width, live, PIECES, BLOCK)
        squares, products = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(PIECES):
            wide = v[j].to(tl.float32)
            squares += wide * wide
            products += g[j].to(tl.float32) * weights[j].to(tl.float32) * wide
        squares, products = tl.reduce((squares, products), 0, _add_pairs)
        scale = tl.rsqrt(squares / width + eps)
        along = products * scale / width
        grads = ()
        added = ()
        for j in tl.static_range(PIECES):
            normed, grad = v[j].to(tl.float32) * scale, g[j].to(tl.float32)
            added = added + (total[j] + grad * normed,)
            grads = grads + ((grad * weights[j].to(tl.float32) - normed * along) * scale,)
        total = added
        if HAS_DSUMMED:
            direct = _load(dsummed + row * ds_row, width, live, PIECES, BLOCK)
            both = ()
            for j in tl.static_range(PIECES):
                both = both + (grads[j] + direct[j].to(tl.float32),)
            grads = both
        _store(dx + row * width, grads, width, live, BLOCK)
    _store(dweight + tl.program_id(0) * width, total, width, True, BLOCK)
