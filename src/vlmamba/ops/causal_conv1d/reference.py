"""The causal depthwise convolution in plain torch.

Legend: B batch, L length, D channels, W taps. `full` is the input with the W - 1 inputs before it: (B, W-1+L, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmamba.ops.selective_scan.reference import compute_dtype, restarts


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None,
    seq_idx: Tensor | None, return_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y (B, L, D) and the last W - 1 inputs (B, W-1, D), both in x's dtype; the second empty if not wanted."""
    taps = weight.shape[1]
    full = _full(x, taps, initial_state, seq_idx)
    y = _convolve(full, weight, bias, seq_idx)
    if activation == "silu":
        y = y * _sigmoid(y)
    if seq_idx is not None:
        y = torch.where((seq_idx >= 0)[..., None], y, 0)
    y = y.to(x.dtype)
    if not return_final_state:
        return y, x.new_empty(0)
    where, kept = _window(x.shape[0], x.shape[1], taps, seq_idx, x.device)
    last = full.gather(1, where[..., None].expand(-1, -1, x.shape[2]))
    return y, (last if kept is None else torch.where(kept[..., None], last, 0)).to(x.dtype)


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    initial_state: Tensor | None, seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of (x, weight, bias, initial_state)."""
    taps = weight.shape[1]
    length = x.shape[1]
    full = _full(x, taps, initial_state, seq_idx)
    dy = dy.to(full.dtype)
    if seq_idx is not None:
        dy = torch.where((seq_idx >= 0)[..., None], dy, 0)
    if activation == "silu":
        y = _convolve(full, weight, bias, seq_idx)
        gate = _sigmoid(y)
        dy = dy * (gate * (1 + y * (1 - gate)))
    dfull = torch.zeros_like(full)
    dweight = torch.empty(weight.shape, dtype=full.dtype, device=x.device)
    same = _same_sequence(seq_idx, taps)
    for tap in range(taps):
        dtap = dy if same is None else torch.where(same[tap], dy, 0)
        dfull[:, tap : tap + length] += dtap * weight[:, tap].to(full.dtype)
        dweight[:, tap] = (dtap * full[:, tap : tap + length]).sum((0, 1))
    if dfinal_state is not None:
        where, kept = _window(x.shape[0], length, taps, seq_idx, x.device)
        dlast = dfinal_state.to(full.dtype)
        dlast = dlast if kept is None else torch.where(kept[..., None], dlast, 0)
        dfull.scatter_add_(1, where[..., None].expand(-1, -1, x.shape[2]), dlast)
    return (
        _copy(dfull[:, taps - 1 :], x.dtype),
        dweight.to(weight.dtype),
        None if bias is None else dy.sum((0, 1)).to(bias.dtype),
        None if initial_state is None else _copy(dfull[:, : taps - 1], initial_state.dtype),
    )


def _copy(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Two results of an op may not share memory."""
    return part.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _sigmoid(v: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-v))


def _full(x: Tensor, taps: int, initial_state: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    dtype = compute_dtype(x)
    x = x.to(dtype)
    if seq_idx is not None:
        x = torch.where((seq_idx >= 0)[..., None], x, 0)
    if initial_state is None:
        before = x.new_zeros(x.shape[0], taps - 1, x.shape[2])
    else:
        before = initial_state.to(dtype)
    return torch.cat((before, x), dim=1)


def _convolve(full: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    taps = weight.shape[1]
    length = full.shape[1] - taps + 1
    same = _same_sequence(seq_idx, taps)
    y = full.new_zeros(full.shape[0], length, full.shape[2])
    if bias is not None:
        y += bias.to(full.dtype)
    for tap in range(taps):
        term = full[:, tap : tap + length] * weight[:, tap].to(full.dtype)
        y += term if same is None else torch.where(same[tap], term, 0)
    return y


def _same_sequence(seq_idx: Tensor | None, taps: int) -> list[Tensor] | None:
    """For every tap (B, L, 1): does the input it reads belong to the sequence of the output position?"""
    if seq_idx is None:
        return None
    sequence = restarts(seq_idx).cumsum(1)
    before = sequence.new_zeros(sequence.shape[0], taps - 1)  # the initial state belongs to the first sequence
    read = torch.cat((before, sequence), dim=1)
    return [(read[:, tap : tap + sequence.shape[1]] == sequence)[..., None] for tap in range(taps)]


def _window(
    batch: int, length: int, taps: int, seq_idx: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Where in `full` the last W - 1 inputs stand (B, W-1), and which of them belong to the last sequence."""
    offsets = torch.arange(taps - 1, device=device)
    if seq_idx is None or length == 0:
        return (length + offsets).expand(batch, -1), None
    valid = (seq_idx >= 0).sum(1, keepdim=True)
    sequence = restarts(seq_idx).cumsum(1)
    read = torch.cat((sequence.new_zeros(batch, taps - 1), sequence), dim=1)
    where = valid + offsets
    return where, read.gather(1, where) == sequence[:, -1:]
