"""What the native kernels of scan and convolution are handed: rows, their chunks, channels cut in blocks of lanes.

A row is one sequence, or one order over one image's patches.
Legend: B batch, K orders, L length, D channels, M blocks of lanes, N vectors a channel block holds (states, taps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmamba.ops.emit import RowArg

# Steps of a chunk at most; the scan keeps the state at every such step for backward. Longer chunks push its tables
# out of the first-level cache (32: a third slower), shorter ones keep more (8: an eighth of L x D x N).
KEPT = 16


@dataclass(frozen=True)
class Cut:
    """Channels cut in blocks of lanes, the last one padded with zeros."""

    channels: int
    lanes: int

    @property
    def blocks(self) -> int:
        return -(-self.channels // self.lanes)

    def blocked(self, values_DN: Tensor) -> Tensor:
        """(..., D, N) to (..., M, N, lanes), float32, a copy."""
        values = values_DN.float()
        surplus = self.blocks * self.lanes - self.channels
        if surplus:
            values = torch.nn.functional.pad(values, (0, 0, 0, surplus))
        values = values.unflatten(-2, (self.blocks, self.lanes)).transpose(-1, -2)
        return values.clone(memory_format=torch.contiguous_format)

    def whole(self, values: Tensor) -> Tensor:
        """(..., M, N, lanes) back to (..., D, N)."""
        return values.transpose(-1, -2).flatten(-3, -2)[..., : self.channels, :].contiguous()

    def vectors(self, values_KD: Tensor | None, orders: int) -> Tensor:
        """(K, D) to (K, M, lanes); zeros for None."""
        if values_KD is None:
            return torch.zeros(orders, self.blocks, self.lanes)
        return self.blocked(values_KD[..., None])[..., 0, :]

    def shares(self, rows: int, threads: int) -> list[range]:
        """The blocks of one row in parts for the threads: two tasks a thread in all, so that a busy core does not
        hold up the rest."""
        parts = min(1 if threads == 1 else -(-2 * threads // max(rows, 1)), self.blocks)
        return [range(self.blocks * part // parts, self.blocks * (part + 1) // parts) for part in range(parts)]


@dataclass(frozen=True)
class Extent:
    """The part of a row that is not padding, and where new sequences begin in it."""

    length: int  # with padding
    valid: int
    restarts: np.ndarray

    def chunks(self, keep: bool = True) -> np.ndarray:
        """int64 [count, 4]: first step, end, whether a sequence begins, slot of the kept state or -1 (always without
        `keep`)."""
        table = _chunks(self.valid, self.restarts)
        if not keep:
            table[:, 3] = -1
        return table

    def chunks_back(self) -> np.ndarray:
        """The same, walking from the last valid position to the first."""
        return _chunks(self.valid, self.valid - self.restarts)


def extents(seq_idx: Tensor | None, batch: int, length: int) -> list[Extent]:
    """The extent of every row."""
    if seq_idx is None:
        return [Extent(length, length, np.empty(0, np.int64))] * batch
    found = []
    for row in seq_idx.numpy():
        valid = int((row >= 0).sum())
        found.append(Extent(length, valid, np.flatnonzero(row[1:valid] != row[: max(valid - 1, 0)]) + 1))
    return found


def _chunks(length: int, restarts: np.ndarray) -> np.ndarray:
    first = np.union1d(np.arange(0, length, KEPT), restarts).astype(np.int64)
    table = np.empty((len(first), 4), np.int64)
    table[:, 0] = first
    table[:-1, 1], table[-1:, 1] = first[1:], length
    table[:, 2] = np.isin(first, restarts)
    table[:, 3] = np.where(first % KEPT == 0, first // KEPT, -1)
    return table


def straight(length: int) -> tuple[np.ndarray]:
    """The walk of a plain sequence, as the only order."""
    return (np.arange(length, dtype=np.int64),)


def readable(tensor: Tensor) -> Tensor:
    """float32 with contiguous channels; any other stride is fine. A view where possible."""
    if tensor.dtype != torch.float32:
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def place(table: list[int], arg: int, tensor: Tensor) -> None:
    """Enter a (L, ...) tensor in a table of arguments: its address, then its row stride in bytes."""
    table[arg], table[arg + 1] = tensor.data_ptr(), tensor.stride(0) * 4


def start_table(size: int, cut: Cut, chunks: np.ndarray, walk: np.ndarray) -> list[int]:
    """A table of `size` arguments with what every row kernel needs."""
    table = [0] * size
    table[RowArg.CHANNELS], table[RowArg.CHUNK_COUNT] = cut.channels, len(chunks)
    table[RowArg.CHUNKS], table[RowArg.WALK] = chunks.ctypes.data, walk.ctypes.data
    return table


def orders_of(tensor: Tensor, b: int, k: int) -> Tensor:
    """Row (b, k) of a (B, K, L, ...) tensor, or of a (B, 1, L, ...) one that all orders share."""
    return tensor[b, min(k, tensor.shape[1] - 1)]


def new_rows(shape: Sequence[int], rows: Sequence[Extent]) -> Tensor:
    """A result that kernels write; zero where there is padding, which they never touch."""
    padded = any(row.valid < row.length for row in rows)
    return torch.zeros(shape) if padded else torch.empty(shape)
