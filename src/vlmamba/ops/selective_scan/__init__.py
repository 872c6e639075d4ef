"""The selective scan of Mamba-1 (Gu and Dao 2023, equations 2 and 3, algorithm 2): public function and torch op.

Legend: B batch, L length, D channels, N states per channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmamba.ops import dispatch, gradients

_OP = "selective_scan"


def selective_scan(
    x_BLD: Tensor,
    dt_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_state: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = (C_t . h_t + D x_t) * silu(z_t) along the length.

    dt_t is softplus(dt + dt_bias), or dt + dt_bias without `dt_softplus`. Inputs are float32, bfloat16, float16 or
    float64; the state and all arithmetic are float32 (float64 for float64 x).

    Args:
        x_BLD, dt_BLD, z: (B, L, D), any strides. B_BLN, C_BLN: (B, L, N).
        A_DN: (D, N), the negative matrix itself, not its logarithm. D, dt_bias: (D,).
        initial_state: (B, D, N), the state before the first position; zero if not given.
        seq_idx: (B, L) int32. The state restarts from zero where it changes; the first position continues
            `initial_state`. Negative values mark padding, which may stand only at the end of a row: it is never
            read, leaves the state alone, and gives y = 0.
        return_final_state: whether to return the state after the last position that is not padding.
        implementation: "reference", "cpu" or "triton"; chosen by device and dtype if not given.

    Returns:
        y (B, L, D) in x's dtype, and the final state (B, D, N), or an empty tensor if not asked for.

    Raises:
        ValueError: shapes that do not fit, a wrong seq_idx dtype, or an implementation that cannot run here.
    """
    _check(x_BLD, dt_BLD, A_DN, B_BLN, C_BLN, D, z, dt_bias, initial_state, seq_idx)
    chosen = dispatch.choose(_OP, x_BLD.device, x_BLD.dtype, implementation)
    inputs = (x_BLD, dt_BLD, A_DN, B_BLN, C_BLN, D, z, dt_bias)
    if dispatch.runs_directly(*inputs, initial_state):
        form = dispatch.module(_OP, chosen)
        y, final, _ = form.forward(*inputs, dt_softplus, initial_state, seq_idx, return_final_state, save=False)
    else:
        y, final, _ = _scan(*inputs, dt_softplus, initial_state, seq_idx, return_final_state, chosen)
    return y, final


@torch.library.custom_op(
    "vlmamba::selective_scan",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
        "bool dt_softplus, Tensor? initial_state, Tensor? seq_idx, bool return_final_state, "
        "str implementation) -> (Tensor, Tensor, Tensor)"
    ),
)
def _scan(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, implementation = inputs
    return dispatch.module(_OP, implementation).forward(*arguments)


@_scan.register_fake
def _scan_fake(x: Tensor, dt: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, return_final_state, implementation = rest
    batch, length, channels = x.shape
    states = A.shape[1]
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    kept = dispatch.module(_OP, implementation).saved_shape(batch, length, channels, states)
    return (
        x.new_empty(x.shape),
        x.new_empty((batch, channels, states) if return_final_state else (0,), dtype=state_dtype),
        x.new_empty(kept, dtype=state_dtype),
    )


@torch.library.custom_op(
    "vlmamba::selective_scan_backward",
    mutates_args=(),
    schema=(
        "(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
        "Tensor? dt_bias, bool dt_softplus, Tensor? initial_state, Tensor? seq_idx, Tensor saved, "
        "str implementation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)
def _scan_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, implementation = rest
    return gradients.none_as_empty(dy, dispatch.module(_OP, implementation).backward(dy, *arguments))


@_scan_backward.register_fake
def _scan_backward_fake(dy: Tensor, dfinal_state: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return gradients.like((*rest[:8], rest[9]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.dt_softplus, initial_state, seq_idx, ctx.return_final_state, ctx.implementation = inputs
    ctx.set_materialize_grads(False)  # a final state that nobody used has no gradient
    ctx.save_for_backward(*tensors, initial_state, seq_idx, output[2])


def _backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, initial_state, seq_idx, saved = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    dfinal_state = dfinal_state if ctx.return_final_state else None
    found = _scan_backward(
        dy, dfinal_state, *tensors, ctx.dt_softplus, initial_state, seq_idx, saved, ctx.implementation
    )
    *found, dinitial = gradients.of_given((*tensors, initial_state), found)
    return *found, None, dinitial, None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    if x.dim() != 3 or A.dim() != 2:
        raise ValueError(
            f"selective_scan: expected x (B, L, D) and A (D, N), got {tuple(x.shape)} and {tuple(A.shape)}"
        )
    batch, length, channels = x.shape
    states = A.shape[1]
    dispatch.check_shapes(
        _OP,
        dt=(dt, (batch, length, channels)),
        A=(A, (channels, states)),
        B=(B, (batch, length, states)),
        C=(C, (batch, length, states)),
        D=(D, (channels,)),
        z=(z, (batch, length, channels)),
        dt_bias=(dt_bias, (channels,)),
        initial_state=(initial_state, (batch, channels, states)),
        seq_idx=(seq_idx, (batch, length)),
    )
    dispatch.check_seq_idx(_OP, seq_idx)
