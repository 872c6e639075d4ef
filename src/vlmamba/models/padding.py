"""Padded batches, exactly: valid tokens are moved to the front of their row, and put back after the last layer.

The recurrences know padding only at the end of a row (a negative `seq_idx`), where it changes nothing. Moving tokens
once per forward pass makes left, right and interior padding, with or without a state to continue from, the same case.

Shapes: B batch, L length, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Compaction:
    """order (B, L): which position each place of the compacted row takes, None if padding is at the end already;
    seq_idx (B, L) int32: the sequence of each compacted place, -1 for padding."""

    order: Tensor | None
    seq_idx: Tensor

    @classmethod
    def of(
        cls, attention_mask: Tensor | Compaction | None, seq_idx: Tensor | None, shape: torch.Size
    ) -> Compaction | None:
        """The compaction for a mask (B, L) of 0 and 1 (or one made before); None when nothing is padded."""
        if attention_mask is None or isinstance(attention_mask, Compaction):
            return attention_mask
        if attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, the tokens are {tuple(shape)}; when continuing "
                "from a state, give the mask of the new tokens only"
            )
        valid = attention_mask != 0
        # One look for both: on a GPU each waits for all work that was queued before.
        nothing, at_end = torch.stack([valid.all(), (valid[:, :-1] >= valid[:, 1:]).all()]).tolist()
        if nothing:
            return None
        order = None if at_end else torch.argsort(valid.logical_not(), dim=1, stable=True)
        sequence = torch.zeros(shape, dtype=torch.int32, device=valid.device) if seq_idx is None else seq_idx
        sequence = sequence.masked_fill(~valid, -1)
        return cls(order, sequence if order is None else sequence.gather(1, order))

    def to_front(self, x: Tensor) -> Tensor:
        """Of (B, L, d) or (B, L)."""
        if self.order is None:
            return x
        return x.gather(1, self.order if x.ndim == 2 else self.order[..., None].expand_as(x))

    def restore(self, x_BLd: Tensor) -> Tensor:
        if self.order is None:
            return x_BLd
        return torch.empty_like(x_BLd).scatter(1, self.order[..., None].expand_as(x_BLd), x_BLd)


def towards_end(attention_mask: Tensor, *tokens: Tensor) -> tuple[Tensor, ...]:
    """A mask (B, L) and tokens (B, L) or (B, L, d), with the valid ones at the end of their row, in their order: where
    what comes next is to be told from the last position."""
    order = torch.argsort(attention_mask != 0, dim=1, stable=True)
    moved = [t.gather(1, order if t.ndim == 2 else order[..., None].expand_as(t)) for t in (attention_mask, *tokens)]
    return tuple(moved)
