"""Causal depthwise convolution on the GPU, in Triton. A thread has some channels and walks along a few steps with the
last W inputs in registers; the steps are loaded in groups before they are used. Every input is read from memory once,
and the W - 1 at the borders once more; padding is recognised by the kernels, which write zeros there.

Serves the sequence (K = 1) and the grid of patches, where each of K orders walks the same patches by its own index.

Letters: B batch, K scan orders, L length (or patches), D channels, W width, C chunks of the walk.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vlmamba.ops.causal_conv1d.triton_kernels import conv_backward_kernel, conv_forward_kernel
from vlmamba.ops.selective_scan.triton import check, multiprocessors, row_major

T = (8, 4)  # steps loaded together: of 2-byte numbers in the common case; where a step takes more registers
CHUNK = (16, 128)  # steps of a program, at least and at most: multiples of T
WARPS = 48  # that a multiprocessor should be given in all before the chunks become longer
BLOCK = 512  # channels of a program, 4 a thread


def conv_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial: Tensor | None, seq_idx: Tensor |
    None, return_final: bool, grid: tuple[int, int] = (0, 0), orders: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (B, L, D) read in K orders; weight (K, D, W), bias (K, D). Gives y (B, K, L, D) and the last W - 1 inputs."""
    K, dim, W = weight.shape
    batch, length, _ = x.shape
    x = row_major(x)
    y = torch.empty((batch, K, length, dim), dtype=x.dtype, device=x.device)
    final = torch.empty((batch, W - 1, dim) if return_final else (0,), dtype=x.dtype, device=x.device)
    if batch and dim:
        cut, blocks, chunk = _cut(dim, length, batch * K, x.device)
        conv_forward_kernel[(blocks, max(1, triton.cdiv(length, chunk)), batch * K)](
            x, weight.contiguous(), bias, initial, seq_idx, y, final, length, dim, K, orders, *grid, chunk, x.stride(0),
            x.stride(1), W=W, T=T[x.dtype == torch.float32], SILU=activation == "silu", GRID=grid != (0, 0),
            HAS_BIAS=bias is not None, HAS_INITIAL=initial is not None, HAS_SEQ=seq_idx is not None,
            HAS_FINAL=return_final, **cut,
        )  # fmt: skip
    return y, final


def conv_rows_backward(
    dy: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    initial: Tensor | None, seq_idx: Tensor | None, grid: tuple[int, int] = (0, 0), orders: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `conv_rows` for dy (B, K, L, D): dx (B, K, L, D) per order, dweight, dbias, dinitial."""
    K, dim, W = weight.shape
    batch, length, _ = x.shape
    x, dy = row_major(x), row_major(dy)
    dx = torch.empty((batch, K, length, dim), dtype=x.dtype, device=x.device)
    if not x.numel():
        return dx, torch.zeros_like(weight), bias if bias is None else torch.zeros_like(bias), _unread(initial, dfinal)
    cut, blocks, chunk = _cut(dim, length, batch * K, x.device)
    chunks = triton.cdiv(length, chunk)
    parts = torch.empty((batch, K, chunks, W + 1, dim), dtype=torch.float32, device=x.device)
    dinitial = None if initial is None else torch.empty_like(initial)
    common = x.dtype != torch.float32 and W <= 4 and grid == (0, 0) and initial is None and dfinal is None
    # With 168 registers a thread three programs stand on a multiprocessor.
    group = {"T": T[0], "maxnreg": 168} if common else {"T": T[1]}
    conv_backward_kernel[(blocks, chunks, batch * K)](
        dy, dfinal, x, weight.contiguous(), bias, initial, seq_idx, dx, parts, dinitial, length, dim, K, orders, *grid,
        chunk, dy.stride(0), dy.stride(1), dy.stride(2), x.stride(0), x.stride(1), W=W, SILU=activation == "silu",
        GRID=grid != (0, 0), HAS_BIAS=bias is not None, HAS_INITIAL=initial is not None, HAS_SEQ=seq_idx is not None,
        HAS_DFINAL=dfinal is not None, **cut, **group,
    )  # fmt: skip
    totals = parts.sum((0, 2))
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(totals[:, :W].transpose(1, 2))
    return dx, dweight, None if bias is None else torch.empty_like(bias).copy_(totals[:, W]), dinitial


def _cut(dim: int, length: int, rows: int, device: torch.device) -> tuple[dict[str, int], int, int]:
    """Channels and warps of a program, how many programs stand side by side for all channels, and how many steps each
    does: long chunks read little twice and leave few partial sums, short ones fill the GPU."""
    block = min(BLOCK, max(32, triton.next_power_of_2(dim)))
    warps, blocks = max(1, block // 128), triton.cdiv(dim, block)
    steps = rows * length * blocks * warps // (WARPS * multiprocessors(device)) // CHUNK[0] * CHUNK[0]
    return {"BLOCK_D": block, "num_warps": warps}, blocks, max(CHUNK[0], min(CHUNK[1], steps))


def _unread(initial: Tensor | None, dfinal: Tensor | None) -> Tensor | None:
    """Gradient of the initial state where there are no steps: that of the final state."""
    if initial is None:
        return None
    return torch.zeros_like(initial) if dfinal is None else torch.empty_like(initial).copy_(dfinal)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor | None,
    seq_idx: Tensor | None, return_final_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (B, L, D), weight (D, W), bias (D,), initial_state (B, W-1, D), seq_idx (B, L) int32, negative for padding.
    Gives y (B, L, D) and the last W - 1 inputs (B, W-1, D), or an empty tensor. Raises ValueError for a dtype or
    device that the kernels cannot take."""
    check("causal_conv1d", x=x, weight=weight, bias=bias, initial_state=initial_state, seq_idx=seq_idx)
    y, final = conv_rows(
        x,
        weight[None],
        _contiguous(bias),
        activation,
        _contiguous(initial_state),
        _contiguous(seq_idx),
        return_final_state,
    )
    return y[:, 0], final


def backward(
    dy: Tensor, dfinal_state: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    initial_state: Tensor | None, seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (dx, dweight, dbias, dinitial_state) of `forward`; None where the input is None."""
    check("causal_conv1d", dy=dy, dfinal_state=dfinal_state, x=x, weight=weight, bias=bias, initial_state=initial_state)
    dx, dweight, dbias, dinitial = conv_rows_backward(
        dy[:, None], _contiguous(dfinal_state), x, weight[None], None if bias is None else bias.contiguous()[None],
        activation, _contiguous(initial_state), _contiguous(seq_idx),
    )  # fmt: skip
    return dx[:, 0], dweight[0], None if dbias is None else dbias[0], dinitial


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
