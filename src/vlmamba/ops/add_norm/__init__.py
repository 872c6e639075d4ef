"""Sum into the residual stream and its root-mean-square norm, in one pass over the stream: public functions, torch op.

The arithmetic is float32 (float64 for a float64 stream) whatever the tensors are; the norm is that of the sum as it is
stored.

Legend: ... leading dimensions, d model width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmamba.ops import dispatch

_OP = "add_norm"


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, implementation: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        x: (..., d). weight: (d,). dtype: of the result.
        implementation: "reference" or "triton"; chosen by device and dtype if not given.

    Returns:
        (..., d) in `dtype`. Differentiable in x and weight.
    """
    return _call(x, None, weight, eps, dtype, implementation)[0]


def add_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    """The residual stream after `delta` was added to it, and the norm of that.

    Args:
        x, delta: (..., d), of the same shape. weight, dtype, implementation: as in `rms_norm`.

    Returns:
        The norm (..., d) in `dtype`, and x + delta (..., d) in x's dtype. Differentiable in all three tensors.
    """
    dispatch.check_shapes(_OP, delta=(delta, x.shape))
    return _call(x, delta, weight, eps, dtype, implementation)


def _call(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, implementation: str | None
) -> tuple[Tensor, Tensor]:
    dispatch.check_shapes(_OP, weight=(weight, x.shape[-1:]))
    chosen = dispatch.choose(_OP, x.device, x.dtype, implementation)
    if chosen != "triton" or weight.dtype == torch.float64:  # plain torch: autograd sees through it
        return dispatch.module(_OP, "reference").forward(x, delta, weight, eps, dtype)
    if dispatch.runs_directly(x, delta, weight):
        return dispatch.module(_OP, chosen).forward(x, delta, weight, eps, dtype)
    return _add_norm(x, delta, weight, eps, dtype)


@torch.library.custom_op("vlmamba::add_norm", mutates_args=())
def _add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return dispatch.module(_OP, "triton").forward(x, delta, weight, eps, dtype)


@_add_norm.register_fake
def _add_norm_fake(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((0,) if delta is None else x.shape)


@torch.library.custom_op("vlmamba::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dnormed: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return dispatch.module(_OP, "triton").backward(dnormed, dsummed, summed, weight, eps)


@_add_norm_backward.register_fake
def _add_norm_backward_fake(
    dnormed: Tensor, dsummed: Tensor | None, summed: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return summed.new_empty(summed.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, delta, weight, eps, dtype = inputs
    ctx.set_materialize_grads(False)  # a sum that nobody used has no gradient
    ctx.save_for_backward(x if delta is None else output[1], weight)
    ctx.eps, ctx.dtype, ctx.delta = eps, dtype, None if delta is None else delta.dtype


def _backward(ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None) -> tuple[Tensor | None, ...]:
    summed, weight = ctx.saved_tensors
    if dnormed is None:
        dnormed = summed.new_zeros(summed.shape, dtype=ctx.dtype)
    dx, dweight = _add_norm_backward(dnormed, None if ctx.delta is None else dsummed, summed, weight, ctx.eps)
    return dx, None if ctx.delta is None else dx.to(ctx.delta), dweight, None, None


_add_norm.register_autograd(_backward, setup_context=_setup_context)
