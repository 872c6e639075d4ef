"""The selective scan in plain torch: the meaning of the faster forms, and the one that runs anywhere.

Time is walked in chunks of 8 steps. Forward keeps the state at the start of every `KEPT` steps only; backward
recomputes the states in between, so nothing of size L x D x N ever exists.

Legend: B batch, L length, T steps of a chunk, D channels, N states per channel, G kept states (ceil(L / KEPT)).
Inside, states are held as (B, N, D): sums over N then run along vectors of channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STEP = 8  # steps whose decays and updates exist at once in forward: they stay in the second-level cache
KEPT = 32  # steps between the states kept for backward


class Inputs(NamedTuple):
    """The tensors of the scan in the dtype they are computed in; padding is already masked by `valid`."""

    x_BLD: Tensor
    dt_BLD: Tensor
    A_ND: Tensor
    B_BLN: Tensor
    C_BLN: Tensor
    z_BLD: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    valid_BL1: Tensor | None  # False at padding
    restart_BL1: Tensor | None  # True where a new sequence begins, so the state before it is dropped


class Chunk(NamedTuple):
    """What the recurrence needs of T consecutive steps."""

    x_BTD: Tensor
    dt_BTD: Tensor  # after bias and softplus; 0 at padding
    slope_BTD: Tensor | None  # d dt / d (dt + bias)
    B_BTN1: Tensor
    C_BTN1: Tensor
    decay_BTND: Tensor
    update_BTND: Tensor


def saved_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the third output of `forward`."""
    return (batch, -(-length // KEPT), states, channels)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, initial_state: Tensor | None, seq_idx: Tensor | None, return_final_state: bool,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y (B, L, D) in x's dtype, the final state (B, D, N) or an empty tensor, and the kept states (none without
    `save`)."""
    inputs = _inputs(x, dt, A, B, C, z, dt_bias, dt_softplus, seq_idx)
    batch, length, channels = x.shape
    state_BND = _initial(initial_state, inputs, batch)
    saved = state_BND.new_empty(saved_shape(batch, length, channels, A.shape[1]) if save else (0,))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for start in range(0, length, STEP):
        if save and start % KEPT == 0:
            saved[:, start // KEPT] = state_BND
        steps = slice(start, min(start + STEP, length))
        chunk = _chunk(inputs, steps, need_slope=False)
        states_BTND = _run(inputs, chunk, steps, state_BND)
        state_BND = states_BTND[:, -1]
        y_BTD = _read(chunk, states_BTND, D)
        if inputs.z_BLD is not None:
            z_BTD = _visible(inputs.z_BLD[:, steps], inputs, steps).to(y_BTD.dtype)
            y_BTD = y_BTD * (z_BTD * _sigmoid(z_BTD))
        y[:, steps] = _visible(y_BTD, inputs, steps)
    final = _channels_first(state_BND) if return_final_state else state_BND.new_empty(0)
    return y, final, saved


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, seq_idx: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of (x, dt, A, B, C, D, z, dt_bias, initial_state), None for what was not given."""
    inputs = _inputs(x, dt, A, B, C, z, dt_bias, dt_softplus, seq_idx)
    batch, length, channels = x.shape
    dx, ddt, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, B, C))
    dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
    dA_ND = torch.zeros_like(inputs.A_ND)
    dD = inputs.A_ND.new_zeros(channels)
    dbias = inputs.A_ND.new_zeros(channels)
    # The gradient that reaches the state after the last step of the chunk at hand.
    dstate_BND = _initial(dfinal_state, inputs, batch)
    for kept in reversed(range(saved.shape[1])):
        steps = slice(kept * KEPT, min((kept + 1) * KEPT, length))
        chunk = _chunk(inputs, steps, need_slope=True)
        states_BTND = _run(inputs, chunk, steps, saved[:, kept])
        dy_BTD = _visible(dy[:, steps], inputs, steps).to(dA_ND.dtype)
        if dz is not None:
            assert inputs.z_BLD is not None
            z_BTD = _visible(inputs.z_BLD[:, steps], inputs, steps).to(dA_ND.dtype)
            gate = _sigmoid(z_BTD)
            slope = gate * (1 + z_BTD * (1 - gate))
            dz[:, steps] = _visible(dy_BTD * _read(chunk, states_BTND, D) * slope, inputs, steps)
            dy_BTD = dy_BTD * (z_BTD * gate)
        dC[:, steps] = (states_BTND * dy_BTD[:, :, None]).sum(-1)
        before_BTND = _before(inputs, states_BTND, saved[:, kept], steps)
        dstates_BTND, dstate_BND = _run_back(inputs, chunk, steps, dy_BTD, dstate_BND)
        dB[:, steps] = (dstates_BTND * (chunk.dt_BTD * chunk.x_BTD)[:, :, None]).sum(-1)
        dupdate_BTD = (dstates_BTND * chunk.B_BTN1).sum(2)
        dexponent_BTND = dstates_BTND.mul_(chunk.decay_BTND).mul_(before_BTND)
        dA_ND += (dexponent_BTND * chunk.dt_BTD[:, :, None]).sum((0, 1))
        ddt_BTD = (dexponent_BTND * inputs.A_ND).sum(2) + dupdate_BTD * chunk.x_BTD
        if chunk.slope_BTD is not None:
            ddt_BTD = ddt_BTD * chunk.slope_BTD
        ddt_BTD = _visible(ddt_BTD, inputs, steps)
        dx_BTD = dupdate_BTD * chunk.dt_BTD
        if D is not None:
            dx_BTD = dx_BTD + dy_BTD * D
            dD += (dy_BTD * chunk.x_BTD).sum((0, 1))
        dx[:, steps], ddt[:, steps] = dx_BTD, ddt_BTD
        dbias += ddt_BTD.sum((0, 1))
    return (
        dx,
        ddt,
        dA_ND.t().to(A.dtype).contiguous(),
        dB,
        dC,
        None if D is None else dD.to(D.dtype),
        dz,
        None if dt_bias is None else dbias.to(dt_bias.dtype),
        None if initial_state is None else _channels_first(dstate_BND).to(initial_state.dtype),
    )


def restarts(seq_idx: Tensor) -> Tensor:
    """(B, L) bool: positions at which a new sequence begins. The first position continues the initial state."""
    changed = torch.zeros(seq_idx.shape, dtype=torch.bool, device=seq_idx.device)
    changed[:, 1:] = (seq_idx[:, 1:] != seq_idx[:, :-1]) & (seq_idx[:, 1:] >= 0)
    return changed


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 is computed in float64, everything else in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def softplus(v: Tensor) -> Tensor:
    """log(1 + e^v), the identity above 20. Built from exp and log1p, whose vector and tail code agree to the bit,
    so that a value does not depend on where in a row it stands."""
    return torch.where(v > 20, v, torch.log1p(torch.exp(v.clamp(max=20))))


def _sigmoid(v: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-v))


def _inputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool,
    seq_idx: Tensor | None,
) -> Inputs:  # fmt: skip
    dtype = compute_dtype(x)
    valid = restart = None
    if seq_idx is not None:
        valid = (seq_idx >= 0)[..., None]
        restart = restarts(seq_idx)[..., None]
    bias = None if dt_bias is None else dt_bias.to(dtype)
    return Inputs(x, dt, A.to(dtype).t().contiguous(), B, C, z, bias, dt_softplus, valid, restart)


def _initial(state_BDN: Tensor | None, inputs: Inputs, batch: int) -> Tensor:
    states, channels = inputs.A_ND.shape
    if state_BDN is None:
        return inputs.A_ND.new_zeros(batch, states, channels)
    return state_BDN.to(inputs.A_ND.dtype).transpose(1, 2)


def _channels_first(state_BND: Tensor) -> Tensor:
    """(B, D, N), always a copy: with nothing to scan the state is still the caller's, and an op may not return that."""
    return state_BND.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _visible(values: Tensor, inputs: Inputs, steps: slice) -> Tensor:
    """Zero at padding, whatever stands there, NaN included."""
    if inputs.valid_BL1 is None:
        return values
    return torch.where(inputs.valid_BL1[:, steps], values, 0)


def _chunk(inputs: Inputs, steps: slice, need_slope: bool) -> Chunk:
    dtype = inputs.A_ND.dtype
    x, dt, B, C = (
        _visible(t[:, steps], inputs, steps).to(dtype)
        for t in (inputs.x_BLD, inputs.dt_BLD, inputs.B_BLN, inputs.C_BLN)
    )
    if inputs.dt_bias is not None:
        dt = dt + inputs.dt_bias
    slope = None
    if inputs.dt_softplus:
        slope = _sigmoid(dt) if need_slope else None
        dt = softplus(dt)
    dt = _visible(dt, inputs, steps)
    decay = (dt[:, :, None] * inputs.A_ND).exp_()
    update = (dt * x)[:, :, None] * B[..., None]
    return Chunk(x, dt, slope, B[..., None], C[..., None], decay, update)


def _run(inputs: Inputs, chunk: Chunk, steps: slice, state_BND: Tensor) -> Tensor:
    """The states after each of the chunk's steps, written over the updates."""
    states_BTND = chunk.update_BTND
    for t in range(states_BTND.shape[1]):
        if inputs.restart_BL1 is not None:
            state_BND = torch.where(inputs.restart_BL1[:, steps.start + t, :, None], 0, state_BND)
        state_BND = states_BTND[:, t].addcmul_(chunk.decay_BTND[:, t], state_BND)
    return states_BTND


def _run_back(inputs: Inputs, chunk: Chunk, steps: slice, dy_BTD: Tensor, dstate_BND: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each step, and of the state before the first."""
    dstates_BTND = dy_BTD[:, :, None] * chunk.C_BTN1
    for t in reversed(range(dstates_BTND.shape[1])):
        dstate_BND = dstates_BTND[:, t].add_(dstate_BND) * chunk.decay_BTND[:, t]
        if inputs.restart_BL1 is not None:
            dstate_BND = torch.where(inputs.restart_BL1[:, steps.start + t, :, None], 0, dstate_BND)
    return dstates_BTND, dstate_BND


def _before(inputs: Inputs, states_BTND: Tensor, first_BND: Tensor, steps: slice) -> Tensor:
    """The state that each step started from."""
    before = torch.cat((first_BND[:, None], states_BTND[:, :-1]), dim=1)
    if inputs.restart_BL1 is not None:
        before = torch.where(inputs.restart_BL1[:, steps, :, None], 0, before)
    return before


def _read(chunk: Chunk, states_BTND: Tensor, D: Tensor | None) -> Tensor:
    y_BTD = (states_BTND * chunk.C_BTN1).sum(2)
    return y_BTD if D is None else y_BTD + chunk.x_BTD * D
