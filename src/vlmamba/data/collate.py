"""Examples to batches: rows of token ids padded on the right, or several examples packed into a row.

Shapes: B rows, L length, I images, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vlmamba.data.records import BadSampleError

NO_LABEL = -100
TILE = 64
"""Packed rows are a multiple of this many tokens long."""


@dataclass(frozen=True)
class Example:
    """One tokenised sample.

    Attributes:
        input_ids, labels: (L,) int64; labels are NO_LABEL where there is no loss.
        pixels: uint8 (3, H, W) per image, in the order of their placeholders.
    """

    id: str
    input_ids: np.ndarray
    labels: np.ndarray
    pixels: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Attributes:
        input_ids, labels: (B, L) int64, right-padded; labels are NO_LABEL on questions, images and padding.
        seq_idx: (B, L) int32, the number of the example within its row, -1 on padding; None when a row is one example.
        pixels: (I, 3, H, W) uint8, the images of all rows in reading order; None without any.
        num_labels: labels that a causal model is asked for; num_tokens: tokens that are not padding.
        ids: of the examples, in reading order; skipped: why samples of this batch were left out.
    """

    input_ids: Tensor
    labels: Tensor
    seq_idx: Tensor | None
    pixels: Tensor | None
    num_labels: int
    num_tokens: int
    ids: tuple[str, ...]
    skipped: tuple[str, ...] = field(default=())

    def to(self, device: torch.device) -> Batch:
        """A copy on `device`; pinned memory travels in the background."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by torch's loader where the device is CUDA."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, **{name: change(held) for name, held in vars(self).items() if isinstance(held, Tensor)})


def truncate(example: Example, max_length: int, image_token_id: int) -> Example:
    """The first `max_length` tokens.

    Raises:
        BadSampleError: an image would be cut, or no label is left.
    """
    cut = example
    if len(example.input_ids) > max_length:
        if np.any(example.input_ids[max_length:] == image_token_id):
            raise BadSampleError(f"{example.id}: its images reach beyond max_length {max_length}")
        cut = replace(example, input_ids=example.input_ids[:max_length], labels=example.labels[:max_length])
    if not (cut.labels[1:] != NO_LABEL).any():
        raise BadSampleError(f"{example.id}: no answer within max_length {max_length}")
    return cut


def collate(
    rows: list[list[Example]],
    pad_id: int,
    *,
    packed: bool = False,
    budget: int | None = None,
    skipped: Sequence[str] = (),
) -> Batch:
    """A batch of rows of examples.

    Args:
        packed: rows may hold several examples, told apart by `seq_idx`.
        budget: the tokens that a packed row may have. Rows are then padded to a multiple of TILE, so that nearly all
            batches have one shape.

    Raises:
        ValueError: a row holds more than `budget` tokens.
    """
    longest = max((sum(len(example.input_ids) for example in row) for row in rows), default=0)
    width = longest if budget is None else min(budget, -(-longest // TILE) * TILE)
    if longest > width:
        raise ValueError(f"a pack of {longest} tokens, where {budget} are allowed: the table of lengths is not theirs")
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    labels = np.full((len(rows), width), NO_LABEL, dtype=np.int64)
    seq_idx = np.full((len(rows), width), -1, dtype=np.int32)
    for r, row in enumerate(rows):
        start = 0
        for number, example in enumerate(row):
            place = slice(start, start + len(example.input_ids))
            input_ids[r, place] = example.input_ids
            labels[r, place] = example.labels
            labels[r, start] = NO_LABEL  # nothing stands before it to predict it from
            seq_idx[r, place] = number
            start = place.stop
    order = [example for row in rows for example in row]
    pixels = [image for example in order for image in example.pixels]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        seq_idx=torch.from_numpy(seq_idx) if packed else None,
        pixels=torch.from_numpy(np.stack(pixels)) if pixels else None,
        num_labels=int((labels != NO_LABEL).sum()),
        num_tokens=sum(len(example.input_ids) for example in order),
        ids=tuple(example.id for example in order),
        skipped=tuple(skipped),
    )
