"""A product of a large weight with up to 16 rows on NVIDIA's matrix units, in Gluon: weights go from memory straight
into the registers that the matrix instruction reads.

Each warp multiplies its share of the columns, so that every thread reads 16 bytes in a row of the weight; the order of
columns within an instruction is a permuted one, the same for both operands. Weights are asked for before the wait for
the kernel before (`device.py`), `DEPTH` blocks of them. Not for Triton's interpreter.
"""

# mypy: ignore-errors
# (Gluon looks like Python, but only its own compiler knows the types of its names.)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def _narrowed(tile, dtype: gl.constexpr):
    """int8 weights in the dtype of x, exactly: w + 128 as the low byte of the float 2^23 + 128 + w."""
    bits = gl.inline_asm_elementwise(
        """{ .reg .b32 t; xor.b32 t, $4, 0x80808080;
        prmt.b32 $0, t, 0x4B000000, 0x7440; prmt.b32 $1, t, 0x4B000000, 0x7441;
        prmt.b32 $2, t, 0x4B000000, 0x7442; prmt.b32 $3, t, 0x4B000000, 0x7443; }""",
        "=r,=r,=r,=r,r", [tile], dtype=gl.int32, is_pure=True, pack=4,
    )  # fmt: skip
    return (bits.to(gl.float32, bitcast=True) - 8388736.0).to(dtype)


@gluon.jit
def skinny_kernel(
    x, weight, scale, out, batch, rows, width, out_b,
    ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr, BLOCK_K: gl.constexpr, CHUNKS: gl.constexpr,
    DEPTH: gl.constexpr, HAS_SCALE: gl.constexpr,
):  # fmt: skip
    """out (batch, rows) = x (batch, width) @ weight (rows, width)^T, times scale (rows,); width = WARPS * CHUNKS *
    BLOCK_K, batch <= COLUMNS."""
    gdc_launch_dependents()
    unit: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, unit, 8)
    right: gl.constexpr = gl.DotOperandLayout(1, unit, 8)
    share: gl.constexpr = CHUNKS * BLOCK_K
    r = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, left)))
    first = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, left))) * share
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, gl.SliceLayout(1, left)))
    own = gl.minimum(r, rows - 1)[None, :, None].to(gl.int64) * width + (first[:, None, None] + k[None, None, :])
    tiles = ()
    for c in gl.static_range(DEPTH):
        tiles += (gl.load(weight + own + c * BLOCK_K, eviction_policy="evict_first"),)
    b = gl.minimum(gl.arange(0, COLUMNS, gl.SliceLayout(0, gl.SliceLayout(1, right))), batch - 1)
    first = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, right))) * share
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(0, gl.SliceLayout(2, right)))
    at = b[None, None, :] * width + (first[:, None, None] + k[None, :, None])
    acc = gl.zeros([WARPS, ROWS, COLUMNS], gl.float32, unit)
    gdc_wait()
    for c in gl.static_range(CHUNKS):
        v = gl.load(x + at + c * BLOCK_K)
        if c + DEPTH < CHUNKS:
            tiles += (gl.load(weight + own + (c + DEPTH) * BLOCK_K, eviction_policy="evict_first"),)
        if HAS_SCALE:
            acc = mma_v2(_narrowed(tiles[c], x.dtype.element_ty), v, acc)
        else:
            acc = mma_v2(tiles[c], v, acc)
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [1, WARPS], [0, 1])
    total = gl.convert_layout(gl.sum(acc, axis=0), flat)
    r = gl.program_id(0) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, flat))
    b = gl.arange(0, COLUMNS, gl.SliceLayout(0, flat))
    if HAS_SCALE:
        total *= gl.load(scale + r, mask=r < rows, other=0.0)[:, None]
    inside = (r < rows)[:, None] & (b < batch)[None, :]
    gl.store(out + b[None, :] * out_b + r[:, None], total.to(out.dtype.element_ty), mask=inside)
