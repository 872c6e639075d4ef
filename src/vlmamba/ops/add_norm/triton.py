"""Sum and root-mean-square norm on the GPU, in Triton: a row is read once, and written once as the sum and once as its
norm.

Legend: R rows, d width of a row.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vlmamba.ops.add_norm.triton_kernels import norm_backward_kernel, norm_forward_kernel
from vlmamba.ops.selective_scan.triton import check, multiprocessors

WIDEST = 32768  # a row lives in the registers of one program


def forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """norm(x + delta) (..., d) in `dtype`, and x + delta in x's dtype (empty without a delta). Raises ValueError for a
    dtype or device that the kernel cannot take."""
    check("add_norm", x=x, delta=delta, weight=weight)
    _check_width(x)
    flat, addend = _rows(x), None if delta is None else _rows(delta)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    summed = torch.empty((0,) if delta is None else x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        width = x.shape[-1]
        norm_forward_kernel[(len(flat),)](
            flat, addend, weight.contiguous(), normed, summed, width, eps, flat.stride(0),
            0 if addend is None else addend.stride(0), HAS_DELTA=delta is not None, **_cut(width),
        )  # fmt: skip
    return normed, summed


def backward(
    dnormed: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x (which is also the delta's), in x's dtype, and of the weight, in its own."""
    check("add_norm", dnormed=dnormed, dsummed=dsummed, summed=summed, weight=weight)
    width = summed.shape[-1]
    dx = torch.empty(summed.shape, dtype=summed.dtype, device=summed.device)
    if not summed.numel():
        return dx, torch.zeros_like(weight)
    flat, grad, extra = _rows(summed), _rows(dnormed), None if dsummed is None else _rows(dsummed)
    each = triton.next_power_of_2(triton.cdiv(len(flat), 8 * multiprocessors(summed.device)))
    programs = triton.cdiv(len(flat), each)
    dweight = torch.empty((programs, width), dtype=torch.float32, device=summed.device)
    norm_backward_kernel[(programs,)](
        grad, extra, flat, weight.contiguous(), dx, dweight, len(flat), width, eps, grad.stride(0),
        0 if extra is None else extra.stride(0), flat.stride(0), ROWS=each, HAS_DSUMMED=extra is not None,
        **_pieces(width),
    )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype)


def _check_width(x: Tensor) -> None:
    if x.shape[-1] > WIDEST:
        raise ValueError(f'add_norm: rows of {x.shape[-1]}, at most {WIDEST}; pass implementation="reference"')


def _rows(t: Tensor) -> Tensor:
    """(..., d) as (R, d), the rows contiguous; a view where possible."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _cut(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _pieces(width: int) -> dict[str, int]:
    """A row in up to 5 pieces of 4 numbers a thread; in more above what 16 warps hold so."""
    warps = min(16, triton.next_power_of_2(triton.cdiv(width, 640)))
    return {"BLOCK": 128 * warps, "PIECES": triton.cdiv(width, 128 * warps), "num_warps": warps}
