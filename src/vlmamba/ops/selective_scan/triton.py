"""Selective scan on the GPU, in Triton: forward and backward of Mamba's recurrence, over a sequence or over a grid of patches.

One kernel serves both: a row is a sequence (K = 1) or one order of one image, and `_position` says where in memory its
step t stands. Every sum over programs goes through partial results in memory and a second pass, so two runs agree bit for bit.

Letters: B batch, K scan orders, R = B * K rows, L length (or patches), D channels, N state size, C saved chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 32  # steps between two saved states: the backward pass recomputes the states in between
LOG2E = tl.constexpr(1.4426950408889634)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def softplus(v):
    """log(1 + exp(v)). The polynomial is log(1 + e) / e on [0, 1], minimax in the relative error (2e-7): no cancellation
    where dt is small, and no second trip to the special-function unit."""
    e = tl.exp2(-tl.abs(v) * LOG2E)
    p = e * 0.0052326880395412445 - 0.029505213722586632
    p = p * e + 0.07822591066360474
    p = p * e - 0.13663242757320404
    p = p * e + 0.19106005132198334
    p = p * e - 0.2484298199415207
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return tl.maximum(v, 0.0) + p * e


@triton.jit
def sigmoid(v):
    """1 / (1 + exp(-v)) as the square of a reciprocal root: one instruction where a division takes eight."""
    r = tl.rsqrt(1.0 + tl.exp2(-v * LOG2E))
    return r * r


@triton.jit
def position(step, length, orders, k, height, width, GRID: tl.constexpr):
    """Where step `step` of order k stands in memory. `orders` packs two bits per k: 1 reverses, 2 walks down the columns."""
    if GRID:
        order = (orders >> (2 * k)) & 3
        t = tl.where(order % 2 == 1, length - 1 - step, step)
        t = tl.where(order >= 2, (t % height) * width + t // height, t)
    else:
        t = step
    return t


@triton.jit
def is_reset(seq_idx, base, step):
    """Whether a new sequence begins at this step (never at the first one, which continues from the initial state)."""
    return tl.load(seq_idx + base + step) != tl.load(seq_idx + base + tl.maximum(step - 1, 0))


@triton.jit
def _forward_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial, seq_idx, lengths, y, final, saved,
    length, dim, states, rows_k, orders, height, width,
    x_b, x_k, x_l, dt_b, dt_k, dt_l, B_b, B_k, B_l, C_b, C_k, C_l, z_b, z_l,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_SEQ: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    b, k = row // rows_k, row % rows_k
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d, in_n = d < dim, n < states
    in_dn = in_d[:, None] & in_n[None, :]
    dn = d[:, None] * states + n[None, :]
    a2 = tl.load(A + k * dim * states + dn, mask=in_dn, other=0.0) * LOG2E
    bias = tl.load(dt_bias + k * dim + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros([BLOCK_D], tl.float32)
    skip = tl.load(D + k * dim + d, mask=in_d, other=0.0) if HAS_D else tl.zeros([BLOCK_D], tl.float32)
    state = row * dim * states + dn
    h = tl.load(initial + state, mask=in_dn, other=0.0) if HAS_INITIAL else tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    end = tl.load(lengths + b) if HAS_SEQ else length
    chunks = tl.cdiv(length, CHUNK)
    for step in range(0, end):
        if step % CHUNK == 0:
            tl.store(saved + (row * chunks + step // CHUNK) * dim * states + dn, h, mask=in_dn)
        p = position(step, length, orders, k, height, width, GRID)
        x_t = tl.load(x + b * x_b + k * x_k + p * x_l + d, mask=in_d, other=0.0).to(tl.float32)
        v = tl.load(dt + b * dt_b + k * dt_k + p * dt_l + d, mask=in_d, other=0.0).to(tl.float32) + bias
        dt_t = softplus(v) if SOFTPLUS else v
        B_t = tl.load(B + b * B_b + k * B_k + p * B_l + n, mask=in_n, other=0.0).to(tl.float32)
        C_t = tl.load(C + b * C_b + k * C_k + p * C_l + n, mask=in_n, other=0.0).to(tl.float32)
        if HAS_SEQ:
            h = tl.where(is_reset(seq_idx, b * length, step), 0.0, h)
        h = tl.exp2(dt_t[:, None] * a2) * h + (dt_t * x_t)[:, None] * B_t[None, :]
        y_t = tl.sum(h * C_t[None, :], axis=1) + skip * x_t
        if HAS_Z:
            z_t = tl.load(z + b * z_b + p * z_l + d, mask=in_d, other=0.0).to(tl.float32)
            y_t *= z_t * sigmoid(z_t)
        tl.store(y + (row * length + p) * dim + d, y_t.to(y.dtype.element_ty), mask=in_d)
    if HAS_FINAL:
        tl.store(final + state, h, mask=in_dn)


@triton.jit
def _backward_kernel(
    dy, dfinal, x, dt, A, B, C, D, z, dt_bias, seq_idx, lengths, saved, scratch,
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial,
    length, dim, states, rows_k, orders, height, width,
    dy_b, dy_l, x_b, x_k, x_l, dt_b, dt_k, dt_l, B_b, B_k, B_l, C_b, C_k, C_l, z_b, z_l,
    CHUNK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTPLUS: tl.constexpr, GRID: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SEQ: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HAS_DINITIAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    b, k = row // rows_k, row % rows_k
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d, in_n = d < dim, n < states
    in_dn = in_d[:, None] & in_n[None, :]
    dn = d[:, None] * states + n[None, :]
    a = tl.load(A + k * dim * states + dn, mask=in_dn, other=0.0)
    bias = tl.load(dt_bias + k * dim + d, mask=in_d, other=0.0) if HAS_BIAS else tl.zeros([BLOCK_D], tl.float32)
    skip = tl.load(D + k * dim + d, mask=in_d, other=0.0) if HAS_D else tl.zeros([BLOCK_D], tl.float32)
    state = row * dim * states + dn
    g = tl.load(dfinal + state, mask=in_dn, other=0.0) if HAS_DFINAL else tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    dA_acc = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    dD_acc = tl.zeros([BLOCK_D], tl.float32)
    dbias_acc = tl.zeros([BLOCK_D], tl.float32)
    end = tl.load(lengths + b) if HAS_SEQ else length
    chunks = tl.cdiv(length, CHUNK)
    blocks = tl.num_programs(0)
    own = scratch + row * CHUNK * dim * states + dn
    for back in range(0, tl.cdiv(end, CHUNK)):
        chunk = tl.cdiv(end, CHUNK) - 1 - back
        first, last = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, end)
        h = tl.load(saved + (row * chunks + chunk) * dim * states + dn, mask=in_dn, other=0.0)
        for step in range(first, last):
            p = position(step, length, orders, k, height, width, GRID)
            x_t = tl.load(x + b * x_b + k * x_k + p * x_l + d, mask=in_d, other=0.0).to(tl.float32)
            v = tl.load(dt + b * dt_b + k * dt_k + p * dt_l + d, mask=in_d, other=0.0).to(tl.float32) + bias
            dt_t = softplus(v) if SOFTPLUS else v
            B_t = tl.load(B + b * B_b + k * B_k + p * B_l + n, mask=in_n, other=0.0).to(tl.float32)
            if HAS_SEQ:
                h = tl.where(is_reset(seq_idx, b * length, step), 0.0, h)
            tl.store(own + (step - first) * dim * states, h, mask=in_dn)
            h = tl.exp2(dt_t[:, None] * (a * LOG2E)) * h + (dt_t * x_t)[:, None] * B_t[None, :]
        tl.debug_barrier()
        for back_step in range(0, last - first):
            step = last - 1 - back_step
            p = position(step, length, orders, k, height, width, GRID)
            x_t = tl.load(x + b * x_b + k * x_k + p * x_l + d, mask=in_d, other=0.0).to(tl.float32)
            v = tl.load(dt + b * dt_b + k * dt_k + p * dt_l + d, mask=in_d, other=0.0).to(tl.float32) + bias
            dt_t = softplus(v) if SOFTPLUS else v
            B_t = tl.load(B + b * B_b + k * B_k + p * B_l + n, mask=in_n, other=0.0).to(tl.float32)
            C_t = tl.load(C + b * C_b + k * C_k + p * C_l + n, mask=in_n, other=0.0).to(tl.float32)
            dy_t = tl.load(dy + b * dy_b + p * dy_l + d, mask=in_d, other=0.0).to(tl.float32)
            h_before = tl.load(own + (step - first) * dim * states, mask=in_dn, other=0.0)
            decay = tl.exp2(dt_t[:, None] * (a * LOG2E))
            if HAS_Z:
                z_t = tl.load(z + b * z_b + p * z_l + d, mask=in_d, other=0.0).to(tl.float32)
                gate = sigmoid(z_t)
                h_t = decay * h_before + (dt_t * x_t)[:, None] * B_t[None, :]
                y_t = tl.sum(h_t * C_t[None, :], axis=1) + skip * x_t
                dz_t = dy_t * y_t * gate * (1.0 + z_t * (1.0 - gate))
                tl.store(dz + (row * length + p) * dim + d, dz_t.to(dz.dtype.element_ty), mask=in_d)
                dy_t *= z_t * gate
            h_t = decay * h_before + (dt_t * x_t)[:, None] * B_t[None, :]
            g += dy_t[:, None] * C_t[None, :]
            part = ((row * blocks + tl.program_id(0)) * length + p) * states + n
            tl.store(dC + part, tl.sum(h_t * dy_t[:, None], axis=0), mask=in_n)
            tl.store(dB + part, tl.sum(g * (dt_t * x_t)[:, None], axis=0), mask=in_n)
            gB = tl.sum(g * B_t[None, :], axis=1)
            g *= decay
            q = g * h_before
            dA_acc += q * dt_t[:, None]
            ddt_t = tl.sum(q * a, axis=1) + x_t * gB
            if SOFTPLUS:
                ddt_t *= sigmoid(v)
            dbias_acc += ddt_t
            dD_acc += dy_t * x_t
            tl.store(dx + (row * length + p) * dim + d, (dt_t * gB + skip * dy_t).to(dx.dtype.element_ty), mask=in_d)
            tl.store(ddt + (row * length + p) * dim + d, ddt_t.to(ddt.dtype.element_ty), mask=in_d)
            if HAS_SEQ:
                g = tl.where(is_reset(seq_idx, b * length, step), 0.0, g)
        tl.debug_barrier()
    tl.store(dA + state, dA_acc, mask=in_dn)
    if HAS_D:
        tl.store(dD + row * dim + d, dD_acc, mask=in_d)
    if HAS_BIAS:
        tl.store(dbias + row * dim + d, dbias_acc, mask=in_d)
    if HAS_DINITIAL:
        tl.store(dinitial + state, g, mask=in_dn)


def row_major(t: Tensor) -> Tensor:
    """The kernels take any outer strides, but the last dimension must be contiguous: copy where it is not."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def check(op: str, *, on_gpu: bool = True, **tensors: Tensor | None) -> None:
    """Raise ValueError for what the kernels cannot take: another dtype, or a tensor off the GPU outside the interpreter."""
    for name, t in tensors.items():
        if t is None:
            continue
        if name in ("slots", "seq_idx"):
            if t.is_floating_point():
                raise ValueError(f"{op}: {name} holds {t.dtype}; expected integers")
        elif t.dtype not in DTYPES:
            raise ValueError(
                f"{op}: {name} is {t.dtype}, but the Triton kernels take float32, bfloat16 and float16; convert it or pass "
                'implementation="reference"'
            )
        if on_gpu and not t.is_cuda and not triton.knobs.runtime.interpret:
            raise ValueError(
                f'{op}: {name} is on {t.device}, but the Triton kernels need a GPU; move it or pass implementation="reference"'
            )


def valid_lengths(seq_idx: Tensor | None) -> Tensor | None:
    """(B,) int32: positions of each row before its padding, which is marked by negative values and stands at the end."""
    return None if seq_idx is None else (seq_idx >= 0).sum(-1, dtype=torch.int32)


def saved_shape(batch: int, length: int, channels: int, states: int) -> tuple[int, ...]:
    """Shape of the third output of `forward`."""
    return (batch, 1, triton.cdiv(length, CHUNK), channels, states)


def _strides(t: Tensor | None) -> tuple[int, int, int]:
    """(batch, order, step) strides of (B, K, L, *)."""
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(2))


def _output(like: Tensor, shape: tuple[int, ...], padded: bool) -> Tensor:
    """Padded positions are never visited, so there the output begins at zero."""
    make = torch.zeros if padded else torch.empty
    return make(shape, dtype=like.dtype, device=like.device)


def scan_rows(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    softplus: bool, initial: Tensor | None, seq_idx: Tensor | None, return_final: bool,
    grid: tuple[int, int] = (0, 0), orders: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Scan K orders of B rows: x, dt (B, K, L, D), B, C (B, K, L, N), A (K, D, N), D, dt_bias (K, D), z (B, L, D);
    states (B, K, D, N). Gives y (B, K, L, D), the final state (empty unless asked for) and the states the backward needs."""
    batch, K, length, dim = x.shape
    N = B.shape[-1]
    x, dt, B, C = map(row_major, (x, dt, B, C))
    z = z if z is None else row_major(z)
    y = _output(x, (batch, K, length, dim), seq_idx is not None)
    chunks = triton.cdiv(length, CHUNK)
    saved = torch.empty((batch, K, chunks, dim, N), dtype=torch.float32, device=x.device)
    final = torch.empty((batch, K, dim, N) if return_final else (0,), dtype=torch.float32, device=x.device)
    BLOCK_D = 32
    if batch and dim:
        _forward_kernel[(triton.cdiv(dim, BLOCK_D), batch * K)](
            x, dt, A.contiguous(), B, C, D, z, dt_bias, initial, seq_idx, valid_lengths(seq_idx), y, final, saved,
            length, dim, N, K, orders, *grid,
            *_strides(x), *_strides(dt), *_strides(B), *_strides(C), *(z.stride()[:2] if z is not None else (0, 0)),
            CHUNK=CHUNK, BLOCK_D=BLOCK_D, BLOCK_N=triton.next_power_of_2(N), SOFTPLUS=softplus, GRID=grid != (0, 0),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, HAS_INITIAL=initial is not None,
            HAS_SEQ=seq_idx is not None, HAS_FINAL=return_final, num_warps=1,
        )  # fmt: skip
    return y, final, saved


def scan_rows_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, softplus: bool, needs_initial: bool, seq_idx: Tensor | None, saved: Tensor,
    grid: tuple[int, int] = (0, 0), orders: int = 0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of `scan_rows`. dy (B, L, D) is shared by the K orders; the gradients of x, dt, B, C come per order."""
    batch, K, length, dim = x.shape
    N = B.shape[-1]
    dy, x, dt, B, C = map(row_major, (dy, x, dt, B, C))
    z = z if z is None else row_major(z)
    padded = seq_idx is not None
    BLOCK_D = 32
    blocks = triton.cdiv(dim, BLOCK_D)
    f32 = x.new_empty(0, dtype=torch.float32)
    dx, ddt = _output(x, (batch, K, length, dim), padded), _output(dt, (batch, K, length, dim), padded)
    dz = None if z is None else _output(z, (batch, length, dim), padded)
    dB, dC = (_output(f32, (batch, K, blocks, length, N), padded) for _ in range(2))
    dA = f32.new_empty((batch, K, dim, N))
    dD, dbias = (None if t is None else f32.new_empty((batch, K, dim)) for t in (D, dt_bias))
    dinitial = f32.new_empty((batch, K, dim, N)) if needs_initial else None
    scratch = f32.new_empty((batch, K, CHUNK, dim, N))
    if batch and dim:
        _backward_kernel[(blocks, batch * K)](
            dy, dfinal, x, dt, A.contiguous(), B, C, D, z, dt_bias, seq_idx, valid_lengths(seq_idx), saved, scratch,
            dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial, length, dim, N, K, orders, *grid,
            *dy.stride()[:2], *_strides(x), *_strides(dt), *_strides(B), *_strides(C),
            *(z.stride()[:2] if z is not None else (0, 0)),
            CHUNK=CHUNK, BLOCK_D=BLOCK_D, BLOCK_N=triton.next_power_of_2(N), SOFTPLUS=softplus, GRID=grid != (0, 0),
            HAS_D=D is not None, HAS_Z=z is not None, HAS_BIAS=dt_bias is not None, HAS_SEQ=padded,
            HAS_DFINAL=dfinal is not None, HAS_DINITIAL=needs_initial, num_warps=1,
        )  # fmt: skip
    return (
        dx, ddt, dA.sum(0), dB.sum(2).to(B.dtype), dC.sum(2).to(C.dtype),
        None if dD is None else dD.sum(0), dz, None if dbias is None else dbias.sum(0), dinitial,
    )  # fmt: skip


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    dt_softplus: bool, initial_state: Tensor | None, seq_idx: Tensor | None, return_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, dt, z (B, L, D), A (D, N), B, C (B, L, N), D, dt_bias (D,), initial_state (B, D, N), seq_idx (B, L) int32, negative
    for padding. Gives y (B, L, D), the final state (B, D, N) or an empty tensor, and the saved states for `backward`.
    Raises ValueError for a dtype or device that the kernels cannot take."""
    check(
        "selective_scan",
        x=x,
        dt=dt,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_state=initial_state,
        seq_idx=seq_idx,
    )
    y, final, saved = scan_rows(
        x[:, None], dt[:, None], A[None], B[:, None], C[:, None], _vector(D), z, _vector(dt_bias), dt_softplus,
        _state(initial_state), _indices(seq_idx), return_final_state,
    )  # fmt: skip
    return y[:, 0], final[:, 0] if return_final_state else final, saved


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, dt_softplus: bool, initial_state: Tensor | None, seq_idx: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state) of `forward`; None where the input is None."""
    check("selective_scan", dy=dy, dfinal_state=dfinal_state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = scan_rows_backward(
        dy, _state(dfinal_state), x[:, None], dt[:, None], A[None], B[:, None], C[:, None], _vector(D), z, _vector(dt_bias),
        dt_softplus, initial_state is not None, _indices(seq_idx), saved,
    )  # fmt: skip
    assert dx is not None and ddt is not None and dA is not None and dB is not None and dC is not None
    return (
        dx[:, 0], ddt[:, 0], dA[0], dB[:, 0], dC[:, 0], None if dD is None else dD[0], dz,
        None if dbias is None else dbias[0], None if dinitial is None else dinitial[:, 0],
    )  # fmt: skip


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()[None]


def _state(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()[:, None]


def _indices(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
