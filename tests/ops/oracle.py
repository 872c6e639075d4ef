"""What the ops mean, as differentiable loops in float64: slow, obvious, independent of every implementation.

Letters: B batch, L length, D channels, N state size, W width, K orders, P patches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=True, initial=None, seq_idx=None):
    """One time step after another; gives y (B, L, D) and the final state (B, D, N)."""
    v = dt if dt_bias is None else dt + dt_bias
    step = softplus(v) if dt_softplus else v
    ys, finals = [], []
    for b in range(x.shape[0]):
        h = x.new_zeros(A.shape) if initial is None else initial[b]
        rows = []
        for t in range(x.shape[1]):
            if seq_idx is not None and seq_idx[b, t] < 0:
                rows.append(x.new_zeros(x.shape[2]))
                continue
            if seq_idx is not None and t and seq_idx[b, t] != seq_idx[b, t - 1]:
                h = torch.zeros_like(h)
            h = torch.exp(step[b, t, :, None] * A) * h + (step[b, t] * x[b, t])[:, None] * B[b, t]
            y = (h * C[b, t]).sum(-1)
            y = y if D is None else y + D * x[b, t]
            rows.append(y if z is None else y * silu(z[b, t]))
        ys.append(torch.stack(rows) if rows else x.new_zeros(0, x.shape[2]))
        finals.append(h)
    return torch.stack(ys), torch.stack(finals)


def conv(x, weight, bias=None, activation=None, initial=None, seq_idx=None):
    """Gives y (B, L, D) and the last W - 1 inputs (B, W-1, D) of the sequence that is open at the end."""
    W = weight.shape[1]
    ys, finals = [], []
    for b in range(x.shape[0]):
        window = [x.new_zeros(x.shape[2])] * (W - 1) if initial is None else list(initial[b])
        rows = []
        for t in range(x.shape[1]):
            if seq_idx is not None and seq_idx[b, t] < 0:
                rows.append(x.new_zeros(x.shape[2]))
                continue
            if seq_idx is not None and t and seq_idx[b, t] != seq_idx[b, t - 1]:
                window = [x.new_zeros(x.shape[2])] * (W - 1)
            window = [*window, x[b, t]]
            y = sum((weight[:, j] * window[j] for j in range(W)), start=x.new_zeros(x.shape[2]))
            y = y if bias is None else y + bias
            rows.append(silu(y) if activation == "silu" else y)
            window = window[1:]
        ys.append(torch.stack(rows) if rows else x.new_zeros(0, x.shape[2]))
        finals.append(torch.stack(window) if window else x.new_zeros(0, x.shape[2]))
    return torch.stack(ys), torch.stack(finals)


def walk(order: int, h: int, w: int) -> Tensor:
    """Patch visited at each step: row, row-reverse, column, column-reverse."""
    path = torch.arange(h * w).view(h, w)
    path = (path.t() if order >= 2 else path).reshape(-1)
    return path.flip(0) if order % 2 else path


def scan_2d(x, dt, A, B, C, D, dt_bias, h, w, orders, dt_softplus=True):
    """The sum over orders of the scan along each path, put back into patch order."""
    total = torch.zeros_like(x[:, 0])
    for k, order in enumerate(orders):
        path = walk(order, h, w)
        y, _ = scan(
            x[:, k, path], dt[:, k, path], A[k], B[:, k, path], C[:, k, path], D[k], None, dt_bias[k], dt_softplus
        )
        total = total + torch.zeros_like(total).index_copy(1, path, y)
    return total


def conv_2d(x, weight, bias, h, w, orders, activation=None):
    """(B, K, P, D): each order's convolution along its path, put back into patch order."""
    out = []
    for k, order in enumerate(orders):
        path = walk(order, h, w)
        y, _ = conv(x[:, path], weight[k], bias[k], activation)
        out.append(torch.zeros_like(x).index_copy(1, path, y))
    return torch.stack(out, 1)


def error(got: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm; infinite where anything is not finite."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if not torch.isfinite(got).all():
        return float("inf")
    scale = expected.norm().item()
    return (got - expected).norm().item() / scale if scale else got.norm().item()
