"""Causal depthwise convolution on the GPU, in Triton: forward, a tile of steps and channels at once; backward, a thread
walks along its channels with the last W inputs in registers.

Serves the sequence (K = 1) and the grid of patches, where each of K orders walks the same patches by its own index.

Letters: B batch, K scan orders, L length (or patches), D channels, W width, C chunks of the walk.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from vlmamba.ops.causal_conv1d.triton_kernels import backward_kernel, forward_kernel
from vlmamba.ops.selective_scan.triton import check, row_major, valid_lengths

TILE = (16, 256)  # steps (at least W - 1) and channels of a program, forward
CHUNK = 64  # steps that a program walks, backward


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
        BLOCK_D = min(TILE[1], max(32, triton.next_power_of_2(dim)))
        forward_kernel[(triton.cdiv(dim, BLOCK_D), max(1, triton.cdiv(length, TILE[0])), batch * K)](
            x, weight.contiguous(), bias, initial, seq_idx, y, final, length, dim, K, orders, *grid, x.stride(0),
            x.stride(1), W=W, BLOCK_L=TILE[0], BLOCK_D=BLOCK_D, SILU=activation == "silu", GRID=grid != (0, 0),
            HAS_BIAS=bias is not None, HAS_INITIAL=initial is not None, HAS_SEQ=seq_idx is not None,
            HAS_FINAL=return_final, num_warps=8,
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
    chunks = max(1, triton.cdiv(length, CHUNK))
    dx = (torch.empty if seq_idx is None else torch.zeros)((batch, K, length, dim), dtype=x.dtype, device=x.device)
    dweight = torch.empty((batch, K, chunks, W, dim), dtype=torch.float32, device=x.device)
    dbias = None if bias is None else torch.empty((batch, K, chunks, dim), dtype=torch.float32, device=x.device)
    dinitial = None if initial is None else torch.empty_like(initial)
    if batch and dim:
        BLOCK_D = min(256, max(32, triton.next_power_of_2(dim)))
        backward_kernel[(triton.cdiv(dim, BLOCK_D), chunks, batch * K)](
            dy, dfinal, x, weight.contiguous(), bias, initial, seq_idx, valid_lengths(seq_idx), dx, dweight, dbias,
            dinitial, length, dim, K, orders, *grid, dy.stride(0), dy.stride(1), dy.stride(2), x.stride(0), x.stride(1),
            W=W, CHUNK=CHUNK, BLOCK_D=BLOCK_D, SILU=activation == "silu", GRID=grid != (0, 0), HAS_BIAS=bias is not
            None, HAS_INITIAL=initial is not None, HAS_SEQ=seq_idx is not None, HAS_DFINAL=dfinal is not None,
            num_warps=4,
        )  # fmt: skip
    dweight_KDW = dweight.sum((0, 2)).transpose(1, 2).to(weight.dtype).contiguous()
    dbias_KD = None if bias is None or dbias is None else dbias.sum((0, 2)).to(bias.dtype)
    return dx, dweight_KDW, dbias_KD, dinitial


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
