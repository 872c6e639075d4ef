"""Convolution and selective scan over a grid of patches on the GPU: all K orders in one launch of the 1-D kernels,
which walk the patches by index; what the orders share (x of the convolution, dy of the scan) is read, never copied.

Letters: B batch, K scan orders, P patches (h * w, row-major), D channels, N state size, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmamba.ops.causal_conv1d.triton import conv_rows, conv_rows_backward
from vlmamba.ops.selective_scan import triton as scan
from vlmamba.ops.selective_scan.triton import check, scan_rows, scan_rows_backward


def pack(orders: Sequence[int]) -> int:
    """Two bits an order: 1 reverses, 2 walks down the columns (row, row-reverse, column, column-reverse = 0, 1, 2,
    3)."""
    return sum(int(order) << (2 * k) for k, order in enumerate(orders))


def saved_shape(batch: int, orders: int, patches: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the second output of `scan_forward`."""
    return (batch, orders, *scan.saved_shape(1, patches, channels, states)[2:])


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, h: int, w: int, orders: Sequence[int]
) -> Tensor:
    """x (B, P, D), weight (K, D, W), bias (K, D). Gives (B, K, P, D), every order in patch order."""
    check("conv_2d", x=x, weight=weight, bias=bias)
    bias = None if bias is None else bias.contiguous()
    return conv_rows(x, weight, bias, activation, None, None, False, (h, w), pack(orders))[0]


def conv_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    h: int,
    w: int,
    orders: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients (dx (B, P, D), dweight, dbias) of `conv_forward`."""
    check("conv_2d", dy=dy, x=x, weight=weight, bias=bias)
    bias = None if bias is None else bias.contiguous()
    dx, dweight, dbias, _ = conv_rows_backward(dy, None, x, weight, bias, activation, None, None, (h, w), pack(orders))
    return dx.sum(1), dweight, dbias


def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    h: int, w: int, orders: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x, dt (B, K, P, D), A (K, D, N), B, C (B, K, P, N), D, dt_bias (K, D). Gives y (B, P, D), the sum over the
    orders, and the saved states for `scan_backward`."""
    check("scan_2d", x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    y, _, saved = scan_rows(
        x, dt, A, B, C, _contiguous(D), None, _contiguous(dt_bias), dt_softplus, None, None, False, (h, w), pack(orders)
    )
    return y.sum(1), saved


def scan_backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, h: int, w: int, orders: Sequence[int], saved: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients (dx, ddt, dA, dB, dC, dD, ddt_bias) of `scan_forward` for dy (B, P, D)."""
    check("scan_2d", dy=dy, x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias)
    dx, ddt, dA, dB, dC, dD, _, dbias, _ = scan_rows_backward(
        dy, None, x, dt, A, B, C, _contiguous(D), None, _contiguous(dt_bias), dt_softplus, False, None, saved, (h, w),
        pack(orders),
    )  # fmt: skip
    return dx, ddt, dA, dB, dC, dD, dbias


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
