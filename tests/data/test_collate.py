"""Padding, packed rows and truncation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmamba.data.collate import NO_LABEL, TILE, Example, collate, truncate
from vlmamba.data.records import BadSampleError

PAD, IMAGE = 0, 9


def example(name: str, length: int, images: int = 0) -> Example:
    ids = np.arange(1, length + 1)
    labels = np.where(ids > 2, ids, NO_LABEL)
    pixels = tuple(np.full((3, 2, 2), ord(name) + i, dtype=np.uint8) for i in range(images))
    return Example(name, ids, labels, pixels)


def test_padding_on_the_right() -> None:
    batch = collate([[example("a", 3)], [example("b", 5, images=1)]], PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[-100, -100, 3, -100, -100], [-100, -100, 3, 4, 5]]
    assert batch.seq_idx is None
    assert (batch.num_labels, batch.num_tokens, batch.ids) == (4, 8, ("a", "b"))
    assert batch.pixels is not None
    assert batch.pixels.shape == (1, 3, 2, 2)
    assert batch.pixels.dtype == torch.uint8


def test_packing_keeps_examples_apart_and_images_in_reading_order() -> None:
    rows = [[example("a", 3, 1), example("c", 4, 2)], [example("b", 6, 1), example("d", 2)]]
    batch = collate(rows, PAD, packed=True, budget=8)
    assert batch.ids == ("a", "c", "b", "d")
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 6, 1, 2]]
    assert batch.seq_idx is not None
    assert batch.seq_idx.tolist() == [[0, 0, 0, 1, 1, 1, 1, -1], [0] * 6 + [1] * 2]
    assert batch.pixels is not None
    assert batch.pixels[:, 0, 0, 0].tolist() == [ord("a"), ord("c"), ord("c") + 1, ord("b")]


def test_first_token_of_a_sample_has_no_label() -> None:
    whole = Example("t", np.array([4, 5]), np.array([4, 5]))
    batch = collate([[whole, whole]], PAD, packed=True, budget=4)
    assert batch.labels.tolist() == [[-100, 5, -100, 5]]
    assert batch.num_labels == 2


def test_packed_rows_have_few_widths() -> None:
    def width(length: int) -> int:
        return collate([[example("a", length)]], PAD, packed=True, budget=200).input_ids.shape[1]

    assert [width(length) for length in (3, 64, 65, 190, 200)] == [TILE, TILE, 2 * TILE, 3 * TILE, 200]


def test_a_pack_above_its_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="a pack of 9 tokens, where 8 are allowed"):
        collate([[example("a", 5), example("b", 4)]], PAD, packed=True, budget=8)


def test_a_row_without_examples_is_padding() -> None:
    batch = collate([[], [example("a", 3)]], PAD, packed=True, budget=4)
    assert batch.seq_idx is not None
    assert batch.seq_idx.tolist() == [[-1] * 4, [0, 0, 0, -1]]
    assert batch.num_labels == 1


def test_nothing_to_collate() -> None:
    batch = collate([], PAD, skipped=["why"])
    assert (batch.num_labels, len(batch.input_ids), batch.skipped) == (0, 0, ("why",))


def test_truncation() -> None:
    assert len(truncate(example("a", 6), 4, IMAGE).labels) == 4
    with pytest.raises(BadSampleError, match="no answer within max_length 2"):
        truncate(example("a", 6), 2, IMAGE)
    with pytest.raises(BadSampleError, match="images reach beyond max_length 8"):
        truncate(example("a", 9), 8, IMAGE)
