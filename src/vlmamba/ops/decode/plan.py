"""How the kernels of a decoding step are cut: pure numbers, chosen by batch size and shape, no tensors.

The figures were chosen for Hopper and are safe elsewhere. Letters: B batch, D channels, P partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Attributes:
    vector_up_to: the batch up to which products run on the ordinary units, weights held in registers.
    matrix_up_to: the batch up to which products run in our matrix kernel; above, in torch's library.
    norm_apart_from: the batch from which the norm runs before the product instead of inside it.
    combine_from: the batch from which the shares of x_proj are added up by a kernel of their own.
    pdl: programmatic dependent launch (NVIDIA since Hopper); prefetch: matrix kernels ask for their weights early.
    vector_bytes, vector_rows: most bytes and rows of a weight that one program of the vector kernel holds.
    """

    vector_up_to: int = 2
    matrix_up_to: int = 32
    norm_apart_from: int = 16
    combine_from: int = 3
    pdl: bool = False
    prefetch: bool = True
    vector_bytes: int = 20480
    vector_rows: int = 8
    vector_block: int = 512
    vector_warps: int = 2
    matrix_rows: int = 0
    matrix_block: int = 128
    matrix_stages: int = 5
    matrix_warps: int = 0
    mix_block: int = 128
    advance_batch: int = 8
    advance_channels: int = 32
    advance_warps: int = 4

    def vector(self, batch: int, rows: int, width: int, itemsize: int) -> tuple[int, int, int]:
        """Rows of the weight per program, columns per load, warps."""
        each = _power_below(self.vector_bytes // (width * itemsize * batch))
        each = min(max(each, 1), self.vector_rows, _power_above(rows))
        return each, min(self.vector_block, _power_above(width)), self.vector_warps

    def matrix(self, batch: int, rows: int, width: int, itemsize: int) -> tuple[int, int, int, int, int]:
        """Block of the batch, of rows, of columns, pipeline stages, warps."""
        block_b = min(max(8, _power_above(batch)), 64)
        block_r = self.matrix_rows or (32 if rows < 8192 else 64 if batch <= 32 else 128)
        warps = self.matrix_warps or (4 if block_r >= 64 or block_b >= 64 else 2)
        block_k = min(self.matrix_block * 2 // itemsize, max(16, _power_above(width)))
        if block_b >= 32:
            block_k = max(16, block_k // 2)  # the batch fills the pipeline's memory too
        return block_b, block_r, block_k, self.matrix_stages, warps

    def mix(self, batch: int, channels: int) -> tuple[int, int, int, int]:
        """Block of the batch (1: no matrix units), of channels, blocks per program, warps."""
        block_k = min(self.mix_block, max(16, _power_above(channels)))
        if batch < self.combine_from:
            return 1, block_k, 1, 8
        return min(max(16, _power_above(batch)), 32), block_k, 1 if batch <= 32 else 4, 8

    def parts(self, batch: int, channels: int) -> int:
        """P, the shares that `mix` leaves."""
        _, block_k, steps, _ = self.mix(batch, channels)
        return -(-channels // (block_k * steps))

    def advance(self, batch: int) -> tuple[int, int, int]:
        """Block of the batch (1: no matrix units), of channels, warps."""
        block_b = 1 if batch < self.combine_from else min(self.advance_batch, _power_above(batch))
        return block_b, self.advance_channels, self.advance_warps


def _power_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _power_below(n: int) -> int:
    return 1 << (n.bit_length() - 1) if n > 0 else 0
