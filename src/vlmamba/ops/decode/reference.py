"""The parts of one decoding step in plain torch: what each kernel of `triton.py` computes.

Arithmetic is float32 (float64 for float64 inputs). Legend: B batch, S slots of the state pool, d model width, D
channels, N state size, R rank of dt, W taps, F = R + 2 N features of x_proj, P partial sums, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmamba.ops.decode.plan import Plan
from vlmamba.ops.selective_scan.reference import compute_dtype
from vlmamba.ops.state_update import reference as update


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor, norm: Tensor | None, eps: float, add: bool, plan: Plan
) -> None:
    """out (B, rows) = norm(x (B, width)) @ (weight (rows, width) * scale (rows,))^T, or is added to with `add`."""
    dtype = compute_dtype(x)
    v = x.to(dtype) if norm is None else _normed(x, norm, eps)
    product = v @ weight.to(dtype).t()
    if scale is not None:
        product = product * scale
    out.copy_(out + product if add else product)


def normalise(h: Tensor, delta: Tensor | None, norm: Tensor, eps: float, out: Tensor, plan: Plan) -> None:
    """h (B, d) += delta (B, d); out (B, d) = norm(h)."""
    if delta is not None:
        h += delta
    out.copy_(_normed(h, norm, eps))


def extract(
    xz: Tensor, conv_state: Tensor, slots: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, weight: Tensor,
    features: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """features (B, F) = weight (F, D) @ silu(conv(x)). The conv state is only read."""
    x = xz[:, : weight.shape[1]].to(compute_dtype(xz))
    v = update.conv_forward(conv_state[slots.long()], x, conv_weight, conv_bias, "silu", None)
    features.copy_(v @ weight.to(v.dtype).t())


def advance(
    features: Tensor, xz: Tensor, conv_state: Tensor, ssm_state: Tensor, slots: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, y: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """One token of the recurrence on `slots` (B,) of conv_state (S, W-1, D) and ssm_state (S, D, N), in place.

    features (B, F): dt (low rank), B and C; weight (D, R): dt_proj; xz (B, 2 D): x, not yet convolved, and the gate z;
    y (B, D): the gated output.
    """
    x = xz[:, : len(weight)].to(compute_dtype(xz))
    x = update.conv_forward(conv_state, x, conv_weight, conv_bias, "silu", slots.long())
    _recur(features, xz, x, ssm_state, slots, weight, dt_bias, A, D, y)


def mix(
    xz: Tensor, conv_state: Tensor, slots: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, weight: Tensor,
    x: Tensor, partial: Tensor, features: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """x (B, D) = silu(conv(the first half of xz (B, 2 D))), the conv_state (S, W-1, D) at `slots` (B,) moves on, and
    features (B, F) = weight (F, D) @ x; partial is not needed here."""
    new = xz[:, : weight.shape[1]].to(compute_dtype(xz))
    x.copy_(update.conv_forward(conv_state, new, conv_weight, conv_bias, "silu", slots.long()))
    features.copy_(x.to(new.dtype) @ weight.to(new.dtype).t())


def recur(
    features: Tensor, xz: Tensor, x: Tensor, dt: Tensor, ssm_state: Tensor, slots: Tensor, weight: Tensor,
    dt_bias: Tensor, A: Tensor, D: Tensor, y: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """One token of the recurrence on `slots` (B,) of ssm_state (S, D, N), in place, after `mix`; dt is not needed
    here."""
    _recur(features, xz, x.to(compute_dtype(xz)), ssm_state, slots, weight, dt_bias, A, D, y)


def _recur(
    features: Tensor, xz: Tensor, x: Tensor, ssm_state: Tensor, slots: Tensor, weight: Tensor, dt_bias: Tensor,
    A: Tensor, D: Tensor, y: Tensor,
) -> None:  # fmt: skip
    (dim, rank), states = weight.shape, A.shape[1]
    low, B, C = features.split([rank, states, states], dim=-1)
    dt = low @ weight.to(low.dtype).t()
    z = xz[:, dim:].to(x.dtype)
    y.copy_(update.forward(ssm_state, x, dt, A, B, C, D, z, dt_bias, True, slots.long()))


def choose(
    logits: Tensor, temperature: Tensor, seed: Tensor, stops: Tensor, limits: Tensor, count: Tensor, history: Tensor,
    tokens: Tensor, slots: Tensor, best: Tensor, where: Tensor, spare: int, plan: Plan,
) -> None:  # fmt: skip
    """tokens (B,) = the next token of each row of logits (B, V): the likeliest where temperature (B,) is 0, else drawn
    with seed (B,). Only the first limits[0] tokens count, number limits[1] (-1: none) never. history (B, capacity) at
    count (B,) takes it too, and count moves on. A row whose token is among `stops` has ended: its slot becomes `spare`,
    so that later steps leave its state alone. best and where are not needed here."""
    known, banned = limits.tolist()
    scores = logits[:, :known].float().clone()
    if banned >= 0:
        scores[:, banned : banned + 1] = -torch.inf
    for b in range(len(scores)):
        if temperature[b] > 0:
            key = int(seed[b]) * 1_000_003 + int(count[b])
            noise = torch.rand(scores[b].shape, generator=torch.Generator().manual_seed(key)).clamp(min=1e-10)
            scores[b] = scores[b] / temperature[b] - torch.log(-torch.log(noise.to(scores.device)))
    tokens.copy_(scores.argmax(-1))
    history.scatter_(1, (count % history.shape[1]).long()[:, None], tokens[:, None])
    count += 1
    slots[torch.isin(tokens, stops)] = spare


def embed(tokens: Tensor, table: Tensor, h: Tensor, plan: Plan) -> None:
    """h (B, d) = table (V, d)[tokens (B,)]."""
    h.copy_(table[tokens])


def _normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    dtype = compute_dtype(x)
    v = x.to(dtype)
    return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * norm.to(dtype)
