"""One token of the recurrence and of the convolution in plain torch, in place.

Legend: S slots, B batch, D channels, N states per channel, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmamba.ops.selective_scan.reference import compute_dtype, softplus


def forward(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    """Advances state (S, D, N) by one token and returns y (B, D) in x's dtype."""
    dtype = compute_dtype(x)
    x_BD, dt_BD, B_BN, C_BN = (t.to(dtype) for t in (x, dt, B, C))
    if dt_bias is not None:
        dt_BD = dt_BD + dt_bias
    if dt_softplus:
        dt_BD = softplus(dt_BD)
    before = state if slots is None else state[slots]
    after_BDN = before * torch.exp(dt_BD[..., None] * A) + (dt_BD * x_BD)[..., None] * B_BN[:, None]
    if slots is None:
        state.copy_(after_BDN)
    else:
        state[slots] = after_BDN.to(state.dtype)
    y = (after_BDN * C_BN[:, None]).sum(-1)
    if D is not None:
        y = y + x_BD * D
    if z is not None:
        gate = z.to(dtype)
        y = y * (gate / (1 + torch.exp(-gate)))
    return y.to(x.dtype)


def conv_forward(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor | None
) -> Tensor:
    """Shifts x (B, D) into state (S, W-1, D), oldest first, and returns the convolution's output (B, D)."""
    dtype = compute_dtype(x)
    before = state if slots is None else state[slots]
    window_BWD = torch.cat((before.to(dtype), x.to(dtype)[:, None]), dim=1)
    after = window_BWD[:, 1:].to(state.dtype)
    if slots is None:
        state.copy_(after)
    else:
        state[slots] = after
    y = (window_BWD * weight.to(dtype).t()).sum(1)
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "silu":
        y = y / (1 + torch.exp(-y))
    return y.to(x.dtype)
