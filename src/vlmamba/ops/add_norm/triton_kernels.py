"""The Triton kernels of sum and norm. `*_row` are strides of rows; a program of `forward_kernel` has one row, one of
`backward_kernel` walks ROWS rows and keeps the weight's gradient in registers: the partial gradients are summed in a
second pass, so two runs agree bit for bit."""

# mypy: ignore-errors
# (Triton's language looks like Python, but only its own compiler knows the types of its names.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
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
def backward_kernel(
    dnormed, dsummed, summed, weight, dx, dweight, rows, width, eps, dn_row, ds_row, s_row, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, HAS_DSUMMED: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    k = tl.arange(0, BLOCK)
    inside = k < width
    w = tl.load(weight + k, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, ROWS):
        row = first + i
        here = inside & (row < rows)
        v = tl.load(summed + row * s_row + k, mask=here, other=0.0).to(tl.float32)
        g = tl.load(dnormed + row * dn_row + k, mask=here, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(v * v, axis=0) / width + eps)
        v *= scale
        total += g * v
        g *= w
        d = (g - v * (tl.sum(g * v, axis=0) / width)) * scale
        if HAS_DSUMMED:
            d += tl.load(dsummed + row * ds_row + k, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row * width + k, d.to(dx.dtype.element_ty), mask=here)
    tl.store(dweight + tl.program_id(0) * width + k, total, mask=inside)
