"""One token of the selective scan and of the convolution, in place on chosen slots of a state pool, in Triton.

Letters: S slots, B batch, D channels, N state size, W width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmamba.ops.lanes import LOG2E, sigmoid, softplus
from vlmamba.ops.selective_scan.triton import check, row_major


@triton.jit
def _scan_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, slots, y,
    dim, states, state_s, x_b, dt_b, B_b, C_b, z_b,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d, in_n = d < dim, n < states
    in_dn = in_d[:, None] & in_n[None, :]
    dn = d[:, None] * states + n[None, :]
    h = tl.load(state + slot * state_s + dn, mask=in_dn, other=0.0)
    x_t = tl.load(x + b * x_b + d, mask=in_d, other=0.0).to(tl.float32)
    v = tl.load(dt + b * dt_b + d, mask=in_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        v += tl.load(dt_bias + d, mask=in_d, other=0.0)
    dt_t = softplus(v) if SOFTPLUS else v
    a = tl.load(A + dn, mask=in_dn, other=0.0) * LOG2E
    B_t = tl.load(B + b * B_b + n, mask=in_n, other=0.0).to(tl.float32)
    C_t = tl.load(C + b * C_b + n, mask=in_n, other=0.0).to(tl.float32)
    h = tl.exp2(dt_t[:, None] * a) * h + (dt_t * x_t)[:, None] * B_t[None, :]
    tl.store(state + slot * state_s + dn, h, mask=in_dn)
    y_t = tl.sum(h * C_t[None, :], axis=1)
    if HAS_D:
        y_t += tl.load(D + d, mask=in_d, other=0.0) * x_t
    if HAS_Z:
        z_t = tl.load(z + b * z_b + d, mask=in_d, other=0.0).to(tl.float32)
        y_t *= z_t * sigmoid(z_t)
    tl.store(y + b * dim + d, y_t.to(y.dtype.element_ty), mask=in_d)


@triton.jit
def _conv_kernel(
    state, x, weight, bias, slots, y, dim, state_s, state_w, x_b,
    W: tl.constexpr, BLOCK_D: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SLOTS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    slot = b
    if HAS_SLOTS:
        slot = tl.load(slots + b).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < dim
    own = state + slot * state_s + d
    new = tl.load(x + b * x_b + d, mask=in_d, other=0.0)
    v = tl.load(weight + d * W + W - 1, mask=in_d, other=0.0).to(tl.float32) * new.to(tl.float32)
    if HAS_BIAS:
        v += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        held = tl.load(own + j * state_w, mask=in_d, other=0.0)
        v += tl.load(weight + d * W + j, mask=in_d, other=0.0).to(tl.float32) * held.to(tl.float32)
        if j > 0:
            tl.store(own + (j - 1) * state_w, held, mask=in_d)
    if W > 1:
        tl.store(own + (W - 2) * state_w, new.to(state.dtype.element_ty), mask=in_d)
    if SILU:
        v *= sigmoid(v)
    tl.store(y + b * dim + d, v.to(y.dtype.element_ty), mask=in_d)


def forward(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, slots: Tensor | None,
) -> Tensor:  # fmt: skip
    """Advance state (S, D, N), in place, by one token on `slots` (B,) (row b where None); gives y (B, D). x, dt, z (B, D),
    A (D, N), B, C (B, N), D, dt_bias (D,). Raises ValueError for a dtype or device that the kernel cannot take."""
    check("state_update", state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, slots=slots)
    if state.dtype != torch.float32 or not state[0:1].is_contiguous():
        raise ValueError(
            f"state_update: state is {state.dtype} with strides {state.stride()}; expected float32 whose slots are contiguous "
            "(D, N) blocks, since it is changed in place"
        )
    batch, dim = x.shape
    N = B.shape[-1]
    y = torch.empty((batch, dim), dtype=x.dtype, device=x.device)
    x, dt, B, C = map(row_major, (x, dt, B, C))
    z = z if z is None else row_major(z)
    BLOCK_D = 64
    if batch and dim:
        _scan_kernel[(triton.cdiv(dim, BLOCK_D), batch)](
            state, x, dt, A.contiguous(), B, C, D, z, dt_bias, slots, y, dim, N,
            state.stride(0), x.stride(0), dt.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
            BLOCK_D=BLOCK_D, BLOCK_N=triton.next_power_of_2(N), SOFTPLUS=dt_softplus, HAS_D=D is not None, HAS_Z=z is not None,
            HAS_BIAS=dt_bias is not None, HAS_SLOTS=slots is not None, num_warps=4,
        )  # fmt: skip
    return y


def conv_forward(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor | None
) -> Tensor:
    """Shift x (B, D) into state (S, W-1, D), in place, on `slots` (B,) (row b where None); gives the convolution's newest
    output (B, D). weight (D, W), bias (D,). Raises ValueError for a dtype or device that the kernel cannot take."""
    check("conv_update", state=state, x=x, weight=weight, bias=bias, slots=slots)
    if state.stride(-1) != 1:
        raise ValueError(f"conv_update: state has strides {state.stride()}; expected contiguous channels, changed in place")
    batch, dim = x.shape
    y = torch.empty((batch, dim), dtype=x.dtype, device=x.device)
    x = row_major(x)
    BLOCK_D = 256
    if batch and dim:
        _conv_kernel[(triton.cdiv(dim, BLOCK_D), batch)](
            state, x, weight.contiguous(), bias, slots, y, dim, state.stride(0), state.stride(1), x.stride(0),
            W=weight.shape[1], BLOCK_D=BLOCK_D, SILU=activation == "silu", HAS_BIAS=bias is not None,
            HAS_SLOTS=slots is not None, num_warps=4,
        )  # fmt: skip
    return y
