"""The Triton kernels of one token: `state_s` is the stride of slots, `*_b` those of the batch."""

# mypy: ignore-errors
# (Triton's language looks like Python, but only its own compiler knows the types of its names; it has no starred
# tuples, and a condition known to it must stand apart from one that is not.)

from __future__ import annotations

import triton
import triton.language as tl

from vlmamba.ops.lanes import LOG2E, sigmoid, softplus


@triton.jit
def state_update_kernel(
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
def conv_update_kernel(
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
