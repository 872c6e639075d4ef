"""The states of all slots in two pieces of memory, so that what a sequence remembers is taken, put back or branched by
a launch or two, however many layers there are.

Shapes: K layers, S slots, D channels, N state size, W convolution width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmamba.models.state import MambaState


@dataclass(frozen=True)
class States:
    """Of several sequences: conv (K, S, W-1, D), dtype of the activations, and ssm (K, S, D, N), float32."""

    conv: Tensor
    ssm: Tensor

    @classmethod
    def zeros(
        cls, layers: int, slots: int, channels: int, state_size: int, conv_kernel: int, *,
        dtype: torch.dtype, device: torch.device | str,
    ) -> States:  # fmt: skip
        """Of sequences that have not begun."""
        conv = torch.zeros(layers, slots, conv_kernel - 1, channels, dtype=dtype, device=device)
        return cls(conv, torch.zeros(layers, slots, channels, state_size, dtype=torch.float32, device=device))

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.ssm.nbytes

    def by_layer(self) -> MambaState:
        """The same memory, as a model reads and writes it."""
        return MambaState(self.conv.unbind(), self.ssm.unbind())

    def gather(self, slots: Tensor) -> States:
        """Copies of some slots, in the order of `slots` (any length, repeats allowed)."""
        return States(self.conv.index_select(1, slots), self.ssm.index_select(1, slots))

    def scatter(self, slots: Tensor, source: States) -> None:
        """Writes slot i of `source` into slot `slots[i]`."""
        self.conv.index_copy_(1, slots, source.conv)
        self.ssm.index_copy_(1, slots, source.ssm)

    def clear(self, slot: int) -> None:
        """A slot whose sequence has not begun."""
        self.conv[:, slot].zero_()
        self.ssm[:, slot].zero_()
