"""Scans and convolutions over a grid of patches in several orders at once (VL-Mamba, section 3.2): public functions
and torch ops.

Everything stays in row-major patch order in memory; an order is a way of walking over the indices.
Legend: B batch, K scan orders, P patches (h * w), D channels, N states per channel, W taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmamba.ops import dispatch, gradients

ORDERS = ("row", "row-reverse", "column", "column-reverse")
_OP = "scan_2d"


def conv_2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    grid: tuple[int, int],
    orders: tuple[str, ...],
    activation: str | None = None,
    implementation: str | None = None,
) -> Tensor:
    """The causal convolution along every order.

    Args:
        x: (B, P, D). weight: (D, W), shared by the orders, or (K, D, W). bias: (D,) or (K, D).
        grid: (h, w) with h * w = P. orders: names out of `ORDERS`. activation: None or "silu".

    Returns:
        (B, K, P, D) in x's dtype, in patch order.

    Raises:
        ValueError: shapes that do not fit, unknown orders or activation, an implementation that cannot run here.
    """
    if x.dim() != 3:
        raise ValueError(f"conv_2d: expected x (B, P, D), got {tuple(x.shape)}")
    walks = _walks("conv_2d", grid, orders, x.shape[1])
    dispatch.check_activation("conv_2d", activation)
    count, channels = len(walks), x.shape[2]
    weight_KDW = _per_order("weight", weight, count, (channels, weight.shape[-1]))
    bias_KD = None if bias is None else _per_order("bias", bias, count, (channels,))
    chosen = dispatch.choose(_OP, x.device, x.dtype, implementation)
    inputs = (x, weight_KDW, bias_KD)
    if dispatch.runs_directly(*inputs):
        return dispatch.module(_OP, chosen).conv_forward(*inputs, activation, *grid, walks)
    return _conv(*inputs, activation, *grid, walks, chosen)


def scan_2d(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    *,
    dt_softplus: bool = True,
    grid: tuple[int, int],
    orders: tuple[str, ...],
    implementation: str | None = None,
) -> Tensor:
    """The selective scan along every order, summed over the orders without atomics: the result is deterministic.

    Args:
        x, dt: (B, K, P, D). B, C: (B, K, P, N). A: (D, N), shared by the orders, or (K, D, N), negative.
        D, dt_bias: (D,) or (K, D). grid: (h, w) with h * w = P. orders: K names out of `ORDERS`.

    Returns:
        y (B, P, D) in x's dtype, in patch order.

    Raises:
        ValueError: shapes that do not fit, unknown orders, or an implementation that cannot run here.
    """
    if x.dim() != 4 or A.dim() not in (2, 3):
        raise ValueError(
            f"{_OP}: expected x (B, K, P, D) and A (D, N) or (K, D, N), got {tuple(x.shape)} and {tuple(A.shape)}"
        )
    batch, count, patches, channels = x.shape
    states = A.shape[-1]
    walks = _walks(_OP, grid, orders, patches)
    if len(walks) != count:
        raise ValueError(f"{_OP}: x {tuple(x.shape)} holds {count} orders, but {len(walks)} are named: {orders}")
    dispatch.check_shapes(
        _OP,
        dt=(dt, (batch, count, patches, channels)),
        B=(B, (batch, count, patches, states)),
        C=(C, (batch, count, patches, states)),
    )
    A_KDN = _per_order("A", A, count, (channels, states))
    D_KD = None if D is None else _per_order("D", D, count, (channels,))
    bias_KD = None if dt_bias is None else _per_order("dt_bias", dt_bias, count, (channels,))
    chosen = dispatch.choose(_OP, x.device, x.dtype, implementation)
    inputs = (x, dt, A_KDN, B, C, D_KD, bias_KD)
    if dispatch.runs_directly(*inputs):
        return dispatch.module(_OP, chosen).scan_forward(*inputs, dt_softplus, *grid, walks)[0]
    return _scan(*inputs, dt_softplus, *grid, walks, chosen)[0]


def _walks(op: str, grid: tuple[int, int], orders: tuple[str, ...], patches: int) -> list[int]:
    h, w = grid
    if h * w != patches:
        raise ValueError(f"{op}: a grid of {h} x {w} has {h * w} patches, the input has {patches}")
    unknown = [order for order in orders if order not in ORDERS]
    if unknown or not orders:
        raise ValueError(f"{op}: unknown orders {unknown} in {orders}; expected one or more of {', '.join(ORDERS)}")
    return [ORDERS.index(order) for order in orders]


def _per_order(name: str, values: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    if values.shape != shape and values.shape != (count, *shape):
        raise ValueError(f"{_OP}: {name} has shape {tuple(values.shape)}, expected {shape} or {(count, *shape)}")
    return values if values.dim() > len(shape) else values.expand(count, *shape)


@torch.library.custom_op(
    "vlmamba::conv_2d",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, str? activation, SymInt h, SymInt w, SymInt[] orders, "
        "str implementation) -> Tensor"
    ),
)
def _conv(*inputs: Any) -> Tensor:
    *arguments, implementation = inputs
    return dispatch.module(_OP, implementation).conv_forward(*arguments)


@_conv.register_fake
def _conv_fake(x: Tensor, *rest: Any) -> Tensor:
    *_, orders, _ = rest
    return x.new_empty((x.shape[0], len(orders), x.shape[1], x.shape[2]))


@torch.library.custom_op(
    "vlmamba::conv_2d_backward",
    mutates_args=(),
    schema=(
        "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, str? activation, SymInt h, SymInt w, SymInt[] orders, "
        "str implementation) -> (Tensor, Tensor, Tensor)"
    ),
)
def _conv_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, implementation = rest
    return gradients.none_as_empty(dy, dispatch.module(_OP, implementation).conv_backward(dy, *arguments))


@_conv_backward.register_fake
def _conv_backward_fake(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return gradients.like(rest[:3])


def _conv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, bias)


def _conv_autograd(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    found = gradients.of_given(given, _conv_backward(dy, *given, *ctx.rest))
    return *found, None, None, None, None, None


_conv.register_autograd(_conv_autograd, setup_context=_conv_setup_context)


@torch.library.custom_op(
    "vlmamba::scan_2d",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, bool dt_softplus, SymInt h, "
        "SymInt w, SymInt[] orders, str implementation) -> (Tensor, Tensor)"
    ),
)
def _scan(*inputs: Any) -> tuple[Tensor, Tensor]:
    *arguments, implementation = inputs
    return dispatch.module(_OP, implementation).scan_forward(*arguments)


@_scan.register_fake
def _scan_fake(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, count, patches, channels = x.shape
    kept = dispatch.module(_OP, rest[-1]).saved_shape(batch, count, patches, channels, A.shape[2])
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((batch, patches, channels)), x.new_empty(kept, dtype=state_dtype)


@torch.library.custom_op(
    "vlmamba::scan_2d_backward",
    mutates_args=(),
    schema=(
        "(Tensor dy, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, "
        "bool dt_softplus, SymInt h, SymInt w, SymInt[] orders, Tensor saved, "
        "str implementation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _scan_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, implementation = rest
    return gradients.none_as_empty(dy, dispatch.module(_OP, implementation).scan_backward(dy, *arguments))


@_scan_backward.register_fake
def _scan_backward_fake(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return gradients.like(rest[:7])


def _scan_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dt_softplus, ctx.h, ctx.w, ctx.orders, ctx.implementation = inputs
    ctx.save_for_backward(*tensors, output[1])


def _scan_autograd(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *given, saved = ctx.saved_tensors
    found = _scan_backward(dy, *given, ctx.dt_softplus, ctx.h, ctx.w, ctx.orders, saved, ctx.implementation)
    return *gradients.of_given(given, found), None, None, None, None, None


_scan.register_autograd(_scan_autograd, setup_context=_scan_setup_context)
