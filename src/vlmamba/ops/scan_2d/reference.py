"""Scans and convolutions over a grid of patches in several orders, by gathering each order and using the 1-D forms.

Legend: B batch, K scan orders, P patches (h * w, row-major), D channels, N states per channel, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmamba.ops.causal_conv1d import reference as conv
from vlmamba.ops.selective_scan import reference as scan

ROW, ROW_REVERSE, COLUMN, COLUMN_REVERSE = range(4)


def walk(order: int, h: int, w: int, device: torch.device | None = None) -> Tensor:
    """(P,) int64: the patch that `order` visits at each step."""
    patches = torch.arange(h * w, device=device)
    if order in (COLUMN, COLUMN_REVERSE):
        patches = patches.view(h, w).t().reshape(-1)
    return patches.flip(0) if order in (ROW_REVERSE, COLUMN_REVERSE) else patches


def saved_shape(batch: int, orders: int, patches: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the second output of `scan_forward`."""
    return (orders, *scan.saved_shape(batch, patches, channels, states))


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, h: int, w: int, orders: list[int]
) -> Tensor:
    """(B, P, D) to (B, K, P, D), every order's output in patch order."""
    y = torch.empty((x.shape[0], len(orders), *x.shape[1:]), dtype=x.dtype, device=x.device)
    for k, order in enumerate(orders):
        path = walk(order, h, w, x.device)
        y[:, k, path] = conv.forward(x[:, path], weight[k], _of(bias, k), activation, None, None, False)[0]
    return y


def conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, h: int, w: int,
    orders: list[int],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of (x, weight, bias)."""
    dx = torch.zeros(x.shape, dtype=scan.compute_dtype(x), device=x.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    for k, order in enumerate(orders):
        path = walk(order, h, w, x.device)
        dx_k, dweight[k], dbias_k, _ = conv.backward(
            dy[:, k, path], None, x[:, path], weight[k], _of(bias, k), activation, None, None
        )
        dx[:, path] += dx_k
        if dbias is not None:
            dbias[k] = dbias_k
    return dx.to(x.dtype), dweight, dbias


def scan_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    h: int, w: int, orders: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y (B, P, D), the sum over orders, and the states kept for backward."""
    batch, _, patches, channels = x.shape
    dtype = scan.compute_dtype(x)
    y = torch.zeros((batch, patches, channels), dtype=dtype, device=x.device)
    saved = torch.empty(saved_shape(batch, len(orders), patches, channels, A.shape[2]), dtype=dtype, device=x.device)
    for k, order in enumerate(orders):
        path = walk(order, h, w, x.device)
        y_k, _, saved[k] = scan.forward(
            x[:, k, path].to(dtype), dt[:, k, path], A[k], B[:, k, path], C[:, k, path],
            _of(D, k), None, _of(dt_bias, k), dt_softplus, None, None, False,
        )  # fmt: skip
        y[:, path] += y_k
    return y.to(x.dtype), saved


def scan_backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, h: int, w: int, orders: list[int], saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of (x, dt, A, B, C, D, dt_bias)."""
    dx, ddt, dA, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, A, B, C))
    dD, dbias = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (D, dt_bias))
    for k, order in enumerate(orders):
        path = walk(order, h, w, x.device)
        dx_k, ddt_k, dA[k], dB_k, dC_k, dD_k, _, dbias_k, _ = scan.backward(
            dy[:, path], None, x[:, k, path], dt[:, k, path], A[k], B[:, k, path], C[:, k, path],
            _of(D, k), None, _of(dt_bias, k), dt_softplus, None, None, saved[k],
        )  # fmt: skip
        for whole, part in ((dx, dx_k), (ddt, ddt_k), (dB, dB_k), (dC, dC_k)):
            whole[:, k, path] = part
        if dD is not None:
            dD[k] = dD_k
        if dbias is not None:
            dbias[k] = dbias_k
    return dx, ddt, dA, dB, dC, dD, dbias


def _of(values: Tensor | None, k: int) -> Tensor | None:
    return None if values is None else values[k]
