"""The causal depthwise convolution in front of the scan: public function and torch op.

Legend: B batch, L length, D channels, W taps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmamba.ops import dispatch, gradients

_OP = "causal_conv1d"


def causal_conv1d(
    x_BLD: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_j weight[:, j] * x_{t-W+1+j}) for every channel; nothing is read across sequences.

    Args:
        x_BLD: (B, L, D), any strides. weight: (D, W). bias: (D,).
        activation: None or "silu".
        initial_state: (B, W-1, D), the inputs before the first position, oldest first; zero if not given.
        seq_idx: (B, L) int32, as in `selective_scan`: the window restarts empty where it changes, negative is padding.
        return_final_state: whether to return the last W - 1 inputs that are not padding.
        implementation: "reference", "cpu" or "triton"; chosen by device and dtype if not given.

    Returns:
        y (B, L, D) and the final window (B, W-1, D), oldest first, or an empty tensor; both in x's dtype.

    Raises:
        ValueError: shapes that do not fit, an unknown activation, or an implementation that cannot run here.
    """
    if x_BLD.dim() != 3 or weight.dim() != 2:
        raise ValueError(
            f"{_OP}: expected x (B, L, D) and weight (D, W), got {tuple(x_BLD.shape)} and {tuple(weight.shape)}"
        )
    batch, length, channels = x_BLD.shape
    taps = weight.shape[1]
    dispatch.check_shapes(
        _OP,
        weight=(weight, (channels, taps)),
        bias=(bias, (channels,)),
        initial_state=(initial_state, (batch, taps - 1, channels)),
        seq_idx=(seq_idx, (batch, length)),
    )
    dispatch.check_seq_idx(_OP, seq_idx)
    dispatch.check_activation(_OP, activation)
    chosen = dispatch.choose(_OP, x_BLD.device, x_BLD.dtype, implementation)
    arguments = (x_BLD, weight, bias, activation, initial_state, seq_idx, return_final_state)
    if dispatch.runs_directly(x_BLD, weight, bias, initial_state):
        return dispatch.module(_OP, chosen).forward(*arguments)
    return _conv(*arguments, chosen)


@torch.library.custom_op(
    "vlmamba::causal_conv1d",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? initial_state, Tensor? seq_idx, "
        "bool return_final_state, str implementation) -> (Tensor, Tensor)"
    ),
)
def _conv(*inputs: Any) -> tuple[Tensor, Tensor]:
    *arguments, implementation = inputs
    return dispatch.module(_OP, implementation).forward(*arguments)


@_conv.register_fake
def _conv_fake(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, return_final_state, _ = rest
    window = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(window if return_final_state else (0,))


@torch.library.custom_op(
    "vlmamba::causal_conv1d_backward",
    mutates_args=(),
    schema=(
        "(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, str? activation, "
        "Tensor? initial_state, Tensor? seq_idx, str implementation) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _conv_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, implementation = rest
    return gradients.none_as_empty(dy, dispatch.module(_OP, implementation).backward(dy, *arguments))


@_conv_backward.register_fake
def _conv_backward_fake(dy: Tensor, dfinal_state: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    x, weight, bias, _, initial_state, *_ = rest
    return gradients.like((x, weight, bias, initial_state))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, activation, initial_state, seq_idx, return_final_state, implementation = inputs
    ctx.set_materialize_grads(False)  # a final state that nobody used has no gradient
    ctx.save_for_backward(x, weight, bias, initial_state, seq_idx)
    ctx.activation, ctx.return_final_state, ctx.implementation = activation, return_final_state, implementation


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, initial_state, seq_idx = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dfinal_state = dfinal_state if ctx.return_final_state else None
    given = (x, weight, bias, ctx.activation, initial_state, seq_idx)
    found = _conv_backward(dy, dfinal_state, *given, ctx.implementation)
    dx, dweight, dbias, dinitial = gradients.of_given((x, weight, bias, initial_state), found)
    return dx, dweight, dbias, None, dinitial, None, None, None


_conv.register_autograd(_backward, setup_context=_setup_context)
