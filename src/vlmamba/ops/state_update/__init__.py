"""One token through the scan and through the convolution, the states changed in place: public functions and torch ops.

Not differentiable: they change their states. Training goes through `selective_scan` and `causal_conv1d`.
Legend: S slots, B batch, D channels, N states per channel, W taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmamba.ops import dispatch

_OP = "state_update"


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    slots: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Advance the state by one token, in place: one step of `selective_scan`.

    Args:
        state: (S, D, N) float32 (float64 with float64 x), contiguous in its last two dimensions.
        x, dt, z: (B, D). A: (D, N). B, C: (B, N). D, dt_bias: (D,).
        slots: (B,) integers, the rows of `state` to advance, all different; the rows 0..B-1 = all of them if not given.

    Returns:
        y (B, D) in x's dtype.

    Raises:
        ValueError: shapes that do not fit, or an implementation that cannot run here.
    """
    if state.dim() != 3 or x.dim() != 2:
        raise ValueError(f"{_OP}: expected state (S, D, N) and x (B, D), got {tuple(state.shape)} and {tuple(x.shape)}")
    batch, channels = x.shape
    states = state.shape[2]
    dispatch.check_shapes(
        _OP,
        state=(state, (state.shape[0] if slots is not None else batch, channels, states)),
        dt=(dt, (batch, channels)),
        A=(A, (channels, states)),
        B=(B, (batch, states)),
        C=(C, (batch, states)),
        D=(D, (channels,)),
        z=(z, (batch, channels)),
        dt_bias=(dt_bias, (channels,)),
        slots=(slots, (batch,)),
    )
    chosen = dispatch.choose(_OP, x.device, x.dtype, implementation)
    inputs = (state, x, dt, A, B, C, D, z, dt_bias)
    _refuse_gradients(_OP, inputs)
    if dispatch.runs_directly(*inputs):
        return dispatch.module(_OP, chosen).forward(*inputs, dt_softplus, slots)
    return _update(*inputs, dt_softplus, slots, chosen)


def conv_update(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    slots: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Shift one token into the window of the convolution, in place: one step of `causal_conv1d`.

    Args:
        state: (S, W-1, D), the last inputs, oldest first, in any floating dtype. x: (B, D). weight: (D, W). bias: (D,).
        activation: None or "silu". slots: as in `state_update`.

    Returns:
        y (B, D) in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, or an implementation that cannot run here.
    """
    if state.dim() != 3 or x.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"conv_update: expected state (S, W-1, D), x (B, D), weight (D, W), "
            f"got {tuple(state.shape)}, {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    batch, channels = x.shape
    taps = weight.shape[1]
    dispatch.check_shapes(
        "conv_update",
        state=(state, (state.shape[0] if slots is not None else batch, taps - 1, channels)),
        weight=(weight, (channels, taps)),
        bias=(bias, (channels,)),
        slots=(slots, (batch,)),
    )
    dispatch.check_activation("conv_update", activation)
    chosen = dispatch.choose(_OP, x.device, x.dtype, implementation)
    inputs = (state, x, weight, bias)
    _refuse_gradients("conv_update", inputs)
    if dispatch.runs_directly(*inputs):
        return dispatch.module(_OP, chosen).conv_forward(*inputs, activation, slots)
    return _conv_update(*inputs, activation, slots, chosen)


def _refuse_gradients(op: str, inputs: tuple[Tensor | None, ...]) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise ValueError(
            f"{op} changes its state in place and has no gradient, but an input requires one: call it under "
            "torch.no_grad() or inference_mode(), or use selective_scan and causal_conv1d"
        )


@torch.library.custom_op(
    "vlmamba::state_update",
    mutates_args=("state",),
    schema=(
        "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
        "Tensor? dt_bias, bool dt_softplus, Tensor? slots, str implementation) -> Tensor"
    ),
)
def _update(*inputs: Any) -> Tensor:
    *arguments, implementation = inputs
    return dispatch.module(_OP, implementation).forward(*arguments)


@torch.library.custom_op(
    "vlmamba::conv_update",
    mutates_args=("state",),
    schema=(
        "(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? slots, "
        "str implementation) -> Tensor"
    ),
)
def _conv_update(*inputs: Any) -> Tensor:
    *arguments, implementation = inputs
    return dispatch.module(_OP, implementation).conv_forward(*arguments)


@_update.register_fake
@_conv_update.register_fake
def _fake(state: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)
