"""The parts of one decoding step on the GPU: the launches of the kernels in `device.py`, cut as a `Plan` says.

Letters: B batch, S slots of the state pool, d model width, D channels, N state size, R rank of dt, W taps, F = R + 2 N
features of x_proj, P partial sums, V vocabulary, C parts of it.
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
    """out (B, rows) = norm(x (B, width)) @ (weight (rows, width) * scale (rows,))^T, or is added to with `add`.

    With more than `plan.vector_up_to` sequences there is neither a norm nor an addition."""
    batch, width = x.shape
    rows = weight.shape[0]
    flags = {"HAS_SCALE": scale is not None, **_pdl(plan)}
    if batch <= plan.vector_up_to:
        rows_each, block, warps = plan.vector(batch, rows, width, weight.element_size())
        chunks = triton.cdiv(width, block)
        device.vector_kernel[(triton.cdiv(rows, rows_each),)](
            x, weight, scale, norm, out, rows, width, x.stride(0), out.stride(0), eps, BATCH=batch, ROWS=rows_each,
            BLOCK_K=block, CHUNKS=chunks, EVEN=width % block == 0 and rows % rows_each == 0, HAS_NORM=norm is not None,
            ADD=add, PACKED=plan.pdl and weight.dtype == torch.int8 and block >= 128 * warps, num_warps=warps, **flags,
        )  # fmt: skip
        return
    block_b, block_r, block_k, stages, warps = plan.matrix(batch, rows, width, weight.element_size())
    device.matrix_kernel[(triton.cdiv(rows, block_r), triton.cdiv(batch, block_b))](
        x, weight, scale, out, batch, rows, width, x.stride(0), out.stride(0), BLOCK_B=block_b, BLOCK_R=block_r,
        BLOCK_K=block_k, STAGES=stages, EVEN=width % block_k == 0 and rows % block_r == 0, DTYPE=_PRODUCTS[x.dtype],
        num_warps=warps, num_stages=stages, **flags,
    )  # fmt: skip


def normalise(h: Tensor, delta: Tensor | None, norm: Tensor, eps: float, out: Tensor, plan: Plan) -> None:
    """h (B, d) += delta (B, d); out (B, d) = norm(h)."""
    block = triton.next_power_of_2(h.shape[1])
    device.norm_kernel[(h.shape[0],)](
        h, delta, norm, out, h.shape[1], eps, BLOCK=block, HAS_DELTA=delta is not None,
        num_warps=min(8, max(1, block // 256)), **_pdl(plan),
    )  # fmt: skip


def extract(
    xz: Tensor, conv_state: Tensor, slots: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, weight: Tensor,
    features: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """features (B, F) = weight (F, D) @ silu(conv(x)), where x is the first half of xz (B, 2 D) and conv_state (S, W-1,
    D), only read, at `slots` (B,) holds the inputs before it."""
    (count, dim), warps = weight.shape, 8
    block = min(1024, triton.next_power_of_2(dim))
    device.features_kernel[(triton.cdiv(count, 2), len(xz))](
        xz, conv_state, slots, conv_weight, conv_bias, weight, features, dim, count, xz.stride(0),
        conv_state.stride(0), *conv_weight.stride(), BLOCK_K=block, CHUNKS=triton.cdiv(dim, block),
        W=conv_weight.shape[1], HAS_BIAS=conv_bias is not None, num_warps=warps, **_pdl(plan),
    )  # fmt: skip


def advance(
    features: Tensor, xz: Tensor, conv_state: Tensor, ssm_state: Tensor, slots: Tensor, conv_weight: Tensor,
    conv_bias: Tensor | None, weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, y: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """One token of the recurrence on `slots` (B,) of conv_state (S, W-1, D) and ssm_state (S, D, N), in place.

    features (B, F): dt (low rank), B and C; weight (D, R): dt_proj; xz (B, 2 D): x, not yet convolved, and the gate z;
    y (B, D): the gated output.
    """
    (dim, rank), block, warps = weight.shape, 32, 4
    block_r = min(32, max(4, triton.next_power_of_2(rank)))
    device.advance_kernel[(triton.cdiv(dim, block), len(xz))](
        features, xz, conv_state, ssm_state, slots, conv_weight, conv_bias, weight, dt_bias, A, D, y, dim, rank,
        features.shape[1], xz.stride(0), conv_state.stride(0), ssm_state.stride(0), *conv_weight.stride(),
        BLOCK_D=block, BLOCK_R=block_r, CHUNKS=triton.cdiv(rank, block_r),
        N=A.shape[1], W=conv_weight.shape[1], HAS_BIAS=conv_bias is not None, num_warps=warps,
        **_pdl(plan),
    )  # fmt: skip


def mix(
    xz: Tensor, conv_state: Tensor, slots: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, weight: Tensor,
    x: Tensor, partial: Tensor, features: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """x (B, D) = silu(conv(the first half of xz (B, 2 D))), the conv_state (S, W-1, D) at `slots` (B,) moves on, and
    features (B, F) = weight (F, D) @ x, by way of partial (P, B, F)."""
    batch, (count, dim), warps = len(xz), weight.shape, 8
    block_b, block_k, tile = plan.block_b(batch), plan.mix_channels(dim), min(64, triton.next_power_of_2(count))
    halves = {"maxnreg": 128} if plan.pdl else {}  # registers: two programs a multiprocessor, so all run at once
    device.mix_kernel[(len(partial), triton.cdiv(batch, block_b))](
        xz, conv_state, slots, conv_weight, conv_bias, weight, x, partial, batch, dim, count, xz.stride(0),
        conv_state.stride(0), *conv_weight.stride(), BLOCK_B=block_b, BLOCK_F=tile,
        TILES=triton.cdiv(count, tile), BLOCK_K=block_k, W=conv_weight.shape[1], DTYPE=_PRODUCTS[weight.dtype],
        HAS_BIAS=conv_bias is not None, num_warps=warps, **_pdl(plan), **halves,
    )  # fmt: skip
    block = 64
    device.combine_kernel[(triton.cdiv(features.numel(), block),)](
        partial, features, features.numel(), len(partial), BLOCK=block, BLOCK_P=triton.next_power_of_2(len(partial)),
        num_warps=4, **_pdl(plan),
    )  # fmt: skip


def recur(
    features: Tensor, xz: Tensor, x: Tensor, dt: Tensor, ssm_state: Tensor, slots: Tensor, weight: Tensor,
    dt_bias: Tensor, A: Tensor, D: Tensor, y: Tensor, plan: Plan,
) -> None:  # fmt: skip
    """One token of the recurrence on `slots` (B,) of ssm_state (S, D, N), in place, after `mix`.

    weight (D, R): dt_proj; dt (B, D) float32 is left in passing; the gate is the second half of xz (B, 2 D); y (B, D).
    """
    batch, (dim, rank), count = len(xz), weight.shape, features.shape[1]
    block_b, block_d, block_r = plan.block_b(batch), 64, min(32, max(16, triton.next_power_of_2(rank)))
    device.delta_kernel[(triton.cdiv(dim, block_d), triton.cdiv(batch, block_b))](
        features, weight, dt_bias, dt, batch, dim, rank, count, BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_R=block_r,
        CHUNKS=triton.cdiv(rank, block_r), DTYPE=_PRODUCTS[weight.dtype], num_warps=4, **_pdl(plan),
    )  # fmt: skip
    channels, together = plan.recur_channels, plan.recur_sequences
    device.recur_kernel[(triton.cdiv(dim, channels), triton.cdiv(batch, together))](
        features, xz, x, dt, ssm_state, slots, A, D, y, batch, dim, rank, count, xz.stride(0), ssm_state.stride(0),
        SEQUENCES=together, BLOCK_D=channels, N=A.shape[1], num_warps=plan.recur_warps, **_pdl(plan),
    )  # fmt: skip


def choose(
    logits: Tensor, temperature: Tensor, seed: Tensor, stops: Tensor, limits: Tensor, count: Tensor, history: Tensor,
    tokens: Tensor, slots: Tensor, best: Tensor, where: Tensor, spare: int, plan: Plan,
) -> None:  # fmt: skip
    """tokens (B,) = the next token of each row of logits (B, V): the likeliest where temperature (B,) is 0, else drawn
    with seed (B,). Only the first limits[0] tokens count, number limits[1] (-1: none) never. history (B, capacity) at
    count (B,) takes it too, and count moves on. A row whose token is among `stops` has ended: its slot becomes `spare`,
    so that later steps leave its state alone. best, where (B, C): scratch."""
    batch, vocabulary = logits.shape
    block = triton.next_power_of_2(triton.cdiv(vocabulary, best.shape[1]))
    parts = triton.cdiv(vocabulary, block)
    device.best_kernel[(batch, parts)](
        logits, temperature, seed, limits, count, best, where, vocabulary, logits.stride(0), parts, BLOCK=block,
        num_warps=4, **_pdl(plan),
    )  # fmt: skip
    device.choose_kernel[(batch,)](
        best, where, stops, count, history, tokens, slots, spare, parts, history.stride(0), history.shape[1],
        BLOCK=triton.next_power_of_2(parts), STOPS=len(stops), num_warps=1, **_pdl(plan),
    )  # fmt: skip


def embed(tokens: Tensor, table: Tensor, h: Tensor, plan: Plan) -> None:
    """h (B, d) = table (V, d)[tokens (B,)]."""
    width = h.shape[1]
    block = min(1024, triton.next_power_of_2(width))
    device.embed_kernel[(h.shape[0], triton.cdiv(width, block))](
        tokens, table, h, width, BLOCK=block, num_warps=4, **_pdl(plan)
    )
