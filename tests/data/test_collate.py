"""Padding, packing and truncation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmamba.data.collate import NO_LABEL, Example, collate, pack_rows, truncate
from vlmamba.data.records import BadSampleError

PAD, IMAGE = 0, 9


def example(name: str, length: int, images: int = 0) -> Example:
    ids = np.arange(1, length + 1)
    labels = np.where(ids > 2, ids, NO_LABEL)
    pixels = tuple(np.full((3, 2, 2), ord(name) + i, dtype=np.uint8) for i in range(images))
    return Example(name, ids, labels, pixels)


def test_padding_on_the_right() -> None:
    batch = collate([example("a", 3), example("b", 5, images=1)], PAD)
    assert batch.input_ids.tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[-100, -100, 3, -100, -100], [-100, -100, 3, 4, 5]]
    assert batch.seq_idx is None
    assert (batch.num_labels, batch.num_tokens, batch.ids) == (4, 8, ("a", "b"))
    assert batch.pixels is not None
    assert batch.pixels.shape == (1, 3, 2, 2)
    assert batch.pixels.dtype == torch.uint8


def test_packing_keeps_examples_apart_and_images_in_reading_order() -> None:
    examples = [example("a", 3, 1), example("b", 6, 1), example("c", 4, 2), example("d", 2)]
    batch = collate(examples, PAD, pack_into=8)
    assert batch.ids == ("a", "c", "b", "d")
    assert batch.input_ids.tolist() == [[1, 2, 3, 1, 2, 3, 4, 0], [1, 2, 3, 4, 5, 6, 1, 2]]
    assert batch.seq_idx is not None
    assert batch.seq_idx.tolist() == [[0, 0, 0, 1, 1, 1, 1, -1], [0] * 6 + [1] * 2]
    assert batch.pixels is not None
    assert batch.pixels[:, 0, 0, 0].tolist() == [ord("a"), ord("c"), ord("c") + 1, ord("b")]


def test_first_token_of_a_row_has_no_label() -> None:
    whole = Example("t", np.array([4, 5]), np.array([4, 5]))
    batch = collate([whole, whole], PAD, pack_into=4)
    assert batch.labels.tolist() == [[-100, 5, -100, 5]]
    assert batch.num_labels == 2


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(10, 50))
def test_packs_hold_every_example_once_within_the_budget(lengths: list[int], budget: int) -> None:
    rows = pack_rows(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= budget for row in rows)


def test_nothing_to_collate() -> None:
    batch = collate([], PAD, skipped=("why",))
    assert (batch.num_labels, len(batch.input_ids), batch.skipped) == (0, 0, ("why",))


def test_truncation() -> None:
    assert len(truncate(example("a", 6), 4, IMAGE).labels) == 4
    with pytest.raises(BadSampleError, match="no answer within max_length 2"):
        truncate(example("a", 6), 2, IMAGE)
    with pytest.raises(BadSampleError, match="images reach beyond max_length 8"):
        truncate(example("a", 9), 8, IMAGE)
