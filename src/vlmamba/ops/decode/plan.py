"""How the kernels of a decoding step are cut: pure numbers, chosen by batch size and shape, no tensors.

The figures were chosen for Hopper and are safe elsewhere. Letters: B batch, D channels, P partial sums.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Attributes:
    vector_up_to: the batch up to which a layer is four kernels, products on the ordinary units with the weights held in
        registers; above, every part is a kernel of its own and products run in torch's library (int8 ones in ours).
    pdl: programmatic dependent launch and other instructions that NVIDIA has since Hopper.
    vector_bytes, vector_rows: most bytes and rows of a weight that one program of the vector kernel holds.
    recur_channels, recur_sequences: how much of the state one program of the recurrence moves on.
    """

    vector_up_to: int = 2
    pdl: bool = False
    vector_bytes: int = 20480
    vector_rows: int = 8
    vector_block: int = 512
    vector_warps: int = 2
    matrix_block: int = 128
    mix_block: int = 128
    recur_channels: int = 64
    recur_sequences: int = 4
    recur_warps: int = 4

    def vector(self, batch: int, rows: int, width: int, itemsize: int) -> tuple[int, int, int]:
        """Rows of the weight per program, columns per load, warps."""
        each = _power_below(self.vector_bytes // (width * itemsize * batch))
        each = min(max(each, 1), self.vector_rows, _power_above(rows))
        return each, min(self.vector_block, _power_above(width)), self.vector_warps

    def matrix(self, batch: int, rows: int, width: int, itemsize: int) -> tuple[int, int, int, int, int]:
        """Block of the batch, of rows, of columns, pipeline stages, warps."""
        block_b = min(max(8, _power_above(batch)), 64)
        block_r = 32 if rows < 8192 else 64 if batch <= 32 else 128
        block_k = min(self.matrix_block * 2 // itemsize, max(16, _power_above(width)))
        if block_b >= 32:
            block_k = max(16, block_k // 2)  # the batch fills the pipeline's memory too
        return block_b, block_r, block_k, 5, 4 if block_r >= 64 or block_b >= 64 else 2

    def block_b(self, batch: int) -> int:
        """Sequences that a program of the small products takes: with the blocks of channels, a program or more for
        every multiprocessor."""
        return 16 if batch <= 64 else 32 if batch <= 128 else 64

    def mix_channels(self, channels: int) -> int:
        """Channels that a program of x_proj adds up."""
        return min(self.mix_block, max(16, _power_above(channels)))

    def parts(self, channels: int) -> int:
        """P, the shares of x_proj."""
        return -(-channels // self.mix_channels(channels))


def _power_above(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _power_below(n: int) -> int:
    return 1 << (n.bit_length() - 1) if n > 0 else 0
