"""Packs are planned: full, complete, random, and the same for the same seed; packed = separate through a model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmamba.data.collate import NO_LABEL, Example, collate
from vlmamba.data.packing import WINDOW, PackedOrder, best_fit, rows_for
from vlmamba.data.sampling import Key, Supply


def mixed(count: int, seed: int = 0) -> np.ndarray:
    """Lengths like those of instructions: 729 tokens of a picture or none, and a text with a long tail."""
    random = np.random.default_rng(seed)
    return (random.random(count) < 0.94) * 729 + random.lognormal(5, 0.8, count).astype(int).clip(20, 1319)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(10, 50))
def test_packs_hold_every_sample_once_within_the_budget(lengths: list[int], budget: int) -> None:
    rows = best_fit(lengths, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= budget for row in rows)
    # Any two rows together overflow: else the second would not have been opened.
    fill = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(fill) < 2 or fill[0] + fill[1] > budget or 0 in fill


def test_the_row_that_is_filled_most_is_taken() -> None:
    assert best_fit([6, 7, 3, 4], 10) == [[0, 3], [1, 2]]


@pytest.mark.parametrize(("lengths", "budget"), [((300, 420), 2560), ((100, 150), 2048)])
def test_rows_mix_lengths(lengths: tuple[int, int], budget: int) -> None:
    """Where the length tells the answer, batches of one length would be batches of one answer."""
    order = np.random.default_rng(0).choice(lengths, 2000)
    means = [order[row].mean() for row in best_fit(order, budget)]
    random = [part.mean() for part in np.array_split(order, len(means))]
    assert np.std(means) < 1.2 * np.std(random)


def keys(order: PackedOrder, first: int, end: int) -> list[Key]:
    return [key for step in range(first, end) for row in order.rows(step) for key in row]


def test_every_sample_once_an_epoch_nearly_without_padding() -> None:
    lengths = mixed(6000)
    order = PackedOrder([Supply(6000, lengths=lengths)], 8192, batch=8, seed=1)
    rows = [row for step in range(order.steps_per_epoch) for row in order.rows(step)]
    fills = [sum(lengths[i] for _, i in row) for row in rows]
    assert max(fills) <= 8192
    padding = 1 - sum(fills) / (8192 * len(fills))
    assert padding < 0.03
    assert order.padding == pytest.approx(padding, abs=0.005)
    assert {key for row in rows for key in row} == {(0, i) for i in range(6000)}
    assert len(keys(order, 0, order.steps_per_epoch)) < 6000 + 8 * 20  # the last batch is filled up
    assert order.samples_per_step == pytest.approx(6000 / len(rows) * 8, rel=0.01)


def test_order_is_a_function_of_seed_and_step() -> None:
    supplies = [Supply(500, lengths=mixed(500)), Supply(300, weight=0.5, lengths=mixed(300, 1))]
    one, other = (PackedOrder(supplies, 2048, batch=4, seed=7) for _ in range(2))
    last = one.steps(3)
    read = [one.rows(step) for step in range(last)]
    for step in (last - 1, 0, last // 2, one.steps_per_epoch):  # another reader, starting anywhere
        assert other.rows(step) == read[step]
    assert read[0] != read[one.steps(1)]
    assert PackedOrder(supplies, 2048, batch=4, seed=8).rows(0) != read[0]


def test_epochs_follow_each_other_whatever_their_number_of_packs() -> None:
    lengths = np.random.default_rng(0).integers(300, 1200, 2 * WINDOW)
    order = PackedOrder([Supply(len(lengths), lengths=lengths)], 2048, batch=1, seed=0)
    bounds = [0, *(order.steps(epochs) for epochs in (1, 2, 3, 4))]
    assert len(set(np.diff(bounds))) > 1
    for first, end in pairwise(bounds):
        assert sorted(i for _, i in keys(order, first, end)) == list(range(len(lengths)))
    assert order.steps(0.5) == round(bounds[1] / 2)
    assert order.steps(1.5) == bounds[1] + round((bounds[2] - bounds[1]) / 2)


def test_long_and_short_are_spread_over_the_epoch() -> None:
    """No step is made of the longest samples only: the mean length of a tenth of an epoch is that of all."""
    lengths = mixed(3 * WINDOW)
    order = PackedOrder([Supply(len(lengths), lengths=lengths)], 2048, batch=8, seed=0)
    read = np.array([lengths[i] for _, i in keys(order, 0, order.steps_per_epoch)])
    for part in np.array_split(read, 10):
        assert part.mean() == pytest.approx(lengths.mean(), rel=0.08)


def test_samples_that_cannot_be_used_are_met_all_the_same() -> None:
    order = PackedOrder([Supply(4, lengths=np.array([5, 0, 5, 0]))], 10, batch=1, seed=0)
    assert sorted(i for _, i in keys(order, 0, order.steps_per_epoch)) == [0, 1, 2, 3]


def test_lengths_are_needed() -> None:
    with pytest.raises(ValueError, match="source 1 has no table of lengths"):
        PackedOrder([Supply(2, lengths=np.array([1, 1])), Supply(3)], 10, 1, 0)


def test_rows_that_hold_as_many_samples() -> None:
    supplies = [Supply(100, lengths=np.full(100, 1000)), Supply(100, weight=2, lengths=np.full(100, 250))]
    assert rows_for(16, supplies, 2000) == 4
    assert rows_for(1, supplies, 2000) == 1


# Through a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_model):
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

    return VLMambaForConditionalGeneration.from_pretrained(tiny_model, dtype=torch.float64).train()


def samples(model, lengths: list[int]) -> list[Example]:
    """With an image of 9 tokens where there is room for one."""
    random = np.random.default_rng(0)
    made = []
    for number, length in enumerate(lengths):
        ids = random.integers(2, 200, length)
        labels = np.where(random.random(length) < 0.5, ids, NO_LABEL)
        labels[-1] = ids[-1]
        pixels: tuple[np.ndarray, ...] = ()
        if length > 12:
            ids[2:11], labels[2:11] = model.config.image_token_id, NO_LABEL
            pixels = (random.integers(0, 256, (3, 24, 24), dtype=np.uint8),)
        made.append(Example(str(number), ids, labels, pixels))
    return made


def run(model, rows: list[list[Example]], packed: bool):
    """Logits by sample (None on images), the gradient of the image pixels, gradients of all parameters."""
    batch = collate(rows, 1, packed=packed)
    pixels = batch.pixels.double().requires_grad_() if batch.pixels is not None else None
    model.zero_grad()
    output = model(
        batch.input_ids, pixels, labels=batch.labels, seq_idx=batch.seq_idx, num_items_in_batch=batch.num_labels
    )
    output.loss.backward()
    with torch.no_grad():
        logits = model(batch.input_ids, pixels, seq_idx=batch.seq_idx).logits
    found, places = {}, [(r, example) for r, row in enumerate(rows) for example in row]
    starts = [0] * len(rows)
    for r, example in places:
        length = len(example.input_ids)
        found[example.id] = logits[r, starts[r] : starts[r] + length]
        starts[r] += length
    return output.loss.item(), found, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_packed_is_separate(model) -> None:
    made = samples(model, [30, 5, 17, 3, 24])
    by_length = best_fit([30, 5, 17, 3, 24], 40)
    packs = [[made[i] for i in row] for row in by_length]
    assert any(len(row) > 1 for row in packs)
    loss, logits, gradients = run(model, packs, packed=True)
    apart_loss, apart, separately = run(model, [[example] for row in packs for example in row], packed=False)
    assert loss == pytest.approx(apart_loss, rel=1e-12)
    for name in apart:
        torch.testing.assert_close(logits[name], apart[name], rtol=1e-10, atol=1e-10)
    assert gradients.keys() == separately.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, separately[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_changed_sample_leaves_its_neighbours_bit_identical(model) -> None:
    made = samples(model, [14, 19, 6, 25])
    _, before, _ = run(model, [made], packed=True)
    changed = Example("1", made[1].input_ids.copy(), made[1].labels, tuple(255 - image for image in made[1].pixels))
    changed.input_ids[[0, 12, -1]] += 1
    _, after, _ = run(model, [[made[0], changed, *made[2:]]], packed=True)
    assert not torch.equal(before["1"], after["1"])
    for name in ("0", "2", "3"):
        assert torch.equal(before[name], after[name])
