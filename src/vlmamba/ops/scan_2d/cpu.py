"""Scans and convolutions over a grid in native code: the kernels of the sequence, walking over the patches by index.

Legend: B batch, K scan orders, P patches (h * w, row-major), D channels, N states per channel, W taps.
"""

from __future__ import annotations

import functools

import numpy as np
from torch import Tensor

from vlmamba.ops.causal_conv1d.cpu import conv_rows, conv_rows_backward
from vlmamba.ops.rows import extents
from vlmamba.ops.scan_2d.reference import walk
from vlmamba.ops.selective_scan import cpu as scan


def saved_shape(batch: int, orders: int, patches: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the second output of `scan_forward`."""
    return scan.saved_shape(batch, patches, channels, states, orders)


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, h: int, w: int, orders: list[int]
) -> Tensor:
    """(B, P, D) to (B, K, P, D), every order's output in patch order."""
    rows = extents(None, x.shape[0], h * w)
    y, _ = conv_rows(x[:, None], weight, bias, activation, None, rows, _walks(h, w, tuple(orders)))
    return y.to(x.dtype)


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, h: int, w: int,
    orders: list[int],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of (x, weight, bias)."""
    rows = extents(None, x.shape[0], h * w)
    walks = _walks(h, w, tuple(orders))
    dx, dweight, dbias = conv_rows_backward(dy, x[:, None], weight, bias, activation, rows, walks)
    return dx.sum(1).to(x.dtype), dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)


def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    h: int, w: int, orders: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y (B, P, D), the sum over orders, and the states kept for backward."""
    rows = scan.make_rows(x, dt, A, B, C, D, None, dt_bias, dt_softplus, None, _walks(h, w, tuple(orders)))
    y, _, saved = scan.scan_rows(rows, None)
    return y.sum(1).to(x.dtype), saved


def scan_backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, h: int, w: int, orders: list[int], saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of (x, dt, A, B, C, D, dt_bias)."""
    rows = scan.make_rows(x, dt, A, B, C, D, None, dt_bias, dt_softplus, None, _walks(h, w, tuple(orders)))
    found = scan.scan_rows_backward(rows, dy[:, None], None, saved)
    return (
        found.x.to(x.dtype),
        found.dt.to(dt.dtype),
        found.A.to(A.dtype),
        found.B.to(B.dtype),
        found.C.to(C.dtype),
        None if D is None else found.D.to(D.dtype),
        None if dt_bias is None else found.dt_bias.to(dt_bias.dtype),
    )


@functools.lru_cache(maxsize=64)
def _walks(h: int, w: int, orders: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return tuple(walk(order, h, w).numpy() for order in orders)
