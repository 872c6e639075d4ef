"""The parts of one decoding step on the GPU: the launches of the kernels in `device.py`, cut as a `Plan` says.

Letters: B batch, S slots of the state pool, d model width, D channels, N state size, R rank of dt, W taps, F = R + 2 N
features of x_proj, P partial sums, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmamba.ops.decode import device
from vlmamba.ops.decode.plan import Plan

_PRODUCTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def _pdl(plan: Plan) -> dict[str, bool]:
    """Launch options: programmatic dependent launch where the plan has it (options unknown elsewhere are left out)."""
    return {"PDL": True, "launch_pdl": True} if plan.pdl else {"PDL": False}


def linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor, norm: Tensor | None, eps: float, add: bool, plan: Plan
) -> None:
    """out (B, rows) = norm(x (B, width)) @ (weight (rows, width) * scale (rows,))^T, or is added to with `add`."""
    batch, width = x.shape
    rows = weight.shape[0]
    flags = {"HAS_NORM": norm is not None, "HAS_SCALE": scale is not None, "ADD": add, **_pdl(plan)}
    if batch <= plan.vector_up_to:
        rows_each, block, warps = plan.vector(batch, rows, width, weight.element_size())
        chunks = triton.cdiv(width, block)
        device.vector_kernel[(triton.cdiv(rows, rows_each),)](
            x, weight, scale, norm, out, rows, width, x.stride(0), out.stride(0), eps, BATCH=batch, ROWS=rows_each,
            BLOCK_K=block, CHUNKS=chunks, EVEN=width % block == 0 and rows % rows_each == 0, num_warps=warps, **flags,
        )  # fmt: skip
        return
    block_b, block_r, block_k, stages, warps = plan.matrix(batch, rows, width, weight.element_size())
    dtype = x.dtype if norm is None else weight.dtype if scale is None else norm.dtype
    device.matrix_kernel[(triton.cdiv(rows, block_r), triton.cdiv(batch, block_b))](
        x, weight, scale, norm, out, batch, rows, width, x.stride(0), out.stride(0), eps, BLOCK_B=block_b,
        BLOCK_R=block_r, BLOCK_K=block_k, STAGES=stages, EVEN=width % block_k == 0 and rows % block_r == 0,
        DTYPE=_PRODUCTS[dtype], LANES=32 * warps, PREFETCH=plan.prefetch and plan.pdl and width % 64 == 0,
        num_warps=warps, num_stages=stages, **flags,
    )  # fmt: skip


def normalise(h: Tensor, delta: Tensor | None, norm: Tensor, eps: float, out: Tensor, plan: Plan) -> None:
    """h (B, d) += delta (B, d); out (B, d) = norm(h)."""
    block = triton.next_power_of_2(h.shape[1])
    device.norm_kernel[(h.shape[0],)](
        h, delta, norm, out, h.shape[1], eps, BLOCK=block, HAS_DELTA=delta is not None,
        num_warps=min(8, max(1, block // 256)), **_pdl(plan),
    )  # fmt: skip


def mix(
    xz: Tensor, conv_state: Tensor, slots: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, weight: Tensor,
    partial: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """partial (P, B, F): shares of weight (F, D) @ silu(conv(x)), where x is the first half of xz (B, 2 D) and
    conv_state (S, W-1, D), read at `slots` (B,), holds the inputs before it."""
    batch, (features, dim) = xz.shape[0], weight.shape
    block_b, block_k, steps, warps = plan.mix(batch, dim)
    device.mix_kernel[(partial.shape[0], triton.cdiv(batch, block_b))](
        xz, conv_state, slots, conv_weight, conv_bias, weight, partial, batch, dim, features, xz.stride(0),
        conv_state.stride(0), BLOCK_B=block_b, BLOCK_F=triton.next_power_of_2(features), BLOCK_K=block_k, STEPS=steps,
        W=conv_weight.shape[1], DTYPE=_PRODUCTS[weight.dtype], HAS_BIAS=conv_bias is not None, MATRIX=block_b > 1,
        num_warps=warps, **_pdl(plan),
    )  # fmt: skip


def combine(partial: Tensor, out: Tensor, plan: Plan) -> None:
    """out (1, B, F) = the sum of partial (P, B, F) over P."""
    count = out.numel()
    block = 128
    device.combine_kernel[(triton.cdiv(count, block),)](
        partial, out, count, partial.shape[0], BLOCK=block, num_warps=2, **_pdl(plan)
    )


def advance(
    partial: Tensor, xz: Tensor, conv_state: Tensor, ssm_state: Tensor, slots: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, y: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """One token of the recurrence on `slots` (B,) of conv_state (S, W-1, D) and ssm_state (S, D, N), in place.

    partial (P, B, F): shares of dt (low rank), B and C; weight (D, R): dt_proj; xz (B, 2 D): x, not yet convolved, and
    the gate z; y (B, D): the gated output.
    """
    batch, (dim, rank), states = xz.shape[0], weight.shape, A.shape[1]
    block_b, block_d, warps = plan.advance(batch)
    device.advance_kernel[(triton.cdiv(dim, block_d), triton.cdiv(batch, block_b))](
        partial, xz, conv_state, ssm_state, slots, conv_weight, conv_bias, weight, dt_bias, A, D, y, batch, dim, rank,
        partial.shape[2], xz.stride(0), conv_state.stride(0), ssm_state.stride(0), PARTS=partial.shape[0], GROUP=8,
        BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_R=max(16, triton.next_power_of_2(rank)), N=states,
        W=conv_weight.shape[1], DTYPE=_PRODUCTS[weight.dtype], HAS_BIAS=conv_bias is not None, MATRIX=block_b > 1,
        num_warps=warps, **_pdl(plan),
    )  # fmt: skip


def choose(
    logits: Tensor, temperature: Tensor, seed: Tensor, stops: Tensor, limits: Tensor, count: Tensor, history: Tensor,
    tokens: Tensor, slots: Tensor, spare: int, plan: Plan,
) -> None:  # fmt: skip
    """tokens (B,) = the next token of each row of logits (B, V): the likeliest where temperature (B,) is 0, else drawn
    with seed (B,). Only the first limits[0] tokens count, number limits[1] (-1: none) never. history (B, capacity) at
    count (B,) takes it too, and count moves on. A row whose token is among `stops` has ended: its slot becomes `spare`,
    so that later steps leave its state alone."""
    device.choose_kernel[(logits.shape[0],)](
        logits, temperature, seed, stops, limits, count, history, tokens, slots, logits.shape[1], spare,
        logits.stride(0), history.stride(0), history.shape[1], STOPS=len(stops),
        BLOCK=min(8192, triton.next_power_of_2(logits.shape[1])), num_warps=16, **_pdl(plan),
    )  # fmt: skip


def embed(tokens: Tensor, table: Tensor, h: Tensor, plan: Plan) -> None:
    """h (B, d) = table (V, d)[tokens (B,)]."""
    width = h.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    device.embed_kernel[(h.shape[0], triton.cdiv(width, block))](
        tokens, table, h, width, BLOCK=block, num_warps=4, **_pdl(plan)
    )
