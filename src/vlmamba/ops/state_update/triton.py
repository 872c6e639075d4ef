"""One token of the selective scan and of the convolution, in place on chosen slots of a state pool, in Triton.

Letters: S slots, B batch, D channels, N state size, W width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vlmamba.ops.selective_scan.triton import check, row_major
from vlmamba.ops.state_update.triton_kernels import conv_update_kernel, state_update_kernel


def forward(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    """Advance state (S, D, N), in place, by one token on `slots` (B,) (row b where None); gives y (B, D). x, dt, z (B,
    D), A (D, N), B, C (B, N), D, dt_bias (D,). Raises ValueError for a dtype or device that the kernel cannot take."""
    check("state_update", state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, slots=slots)
    if state.dtype != torch.float32 or not state[0:1].is_contiguous():
        raise ValueError(
            f"state_update: state is {state.dtype} with strides {state.stride()}; expected float32 whose slots are "
            "contiguous (D, N) blocks, since it is changed in place"
        )
    batch, dim = x.shape
    N = B.shape[-1]
    y = torch.empty((batch, dim), dtype=x.dtype, device=x.device)
    x, dt, B, C = map(row_major, (x, dt, B, C))
    z = z if z is None else row_major(z)
    BLOCK_D = 64
    if batch and dim:
        state_update_kernel[(triton.cdiv(dim, BLOCK_D), batch)](
            state, x, dt, A.contiguous(), B, C, D, z, dt_bias, slots, y, dim, N,
            state.stride(0), x.stride(0), dt.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
            BLOCK_D=BLOCK_D, BLOCK_N=triton.next_power_of_2(N), SOFTPLUS=dt_softplus, HAS_D=D is not None,
            HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None, HAS_SLOTS=slots is not None, num_warps=4,
        )  # fmt: skip
    return y


def conv_forward(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor | None
) -> Tensor:
    """Shift x (B, D) into state (S, W-1, D), in place, on `slots` (B,) (row b where None); gives the convolution's
    newest output (B, D). weight (D, W), bias (D,). Raises ValueError for a dtype or device that the kernel cannot
    take."""
    check("conv_update", state=state, x=x, weight=weight, bias=bias, slots=slots)
    if state.stride(-1) != 1:
        raise ValueError(
            f"conv_update: state has strides {state.stride()}; expected contiguous channels, changed in place"
        )
    batch, dim = x.shape
    y = torch.empty((batch, dim), dtype=x.dtype, device=x.device)
    x = row_major(x)
    BLOCK_D = 256
    if batch and dim:
        conv_update_kernel[(triton.cdiv(dim, BLOCK_D), batch)](
            state, x, weight.contiguous(), bias, slots, y, dim, state.stride(0), state.stride(1), x.stride(0),
            W=weight.shape[1], BLOCK_D=BLOCK_D, SILU=activation == "silu", HAS_BIAS=bias is not None,
            HAS_SLOTS=slots is not None, num_warps=4,
        )  # fmt: skip
    return y
