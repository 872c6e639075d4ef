"""The order of the data is a pure function of (seed, epoch, position)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlmamba.data.sampling import Order, Supply


def epoch(order: Order, number: int) -> list[tuple[int, int]]:
    first = number * order.steps_per_epoch
    return [key for step in range(first, first + order.steps_per_epoch) for key in order.keys(step)]


def test_every_sample_once_an_epoch_in_another_order() -> None:
    order = Order([Supply(24), Supply(8)], batch=8, seed=3)
    one, two = epoch(order, 0), epoch(order, 1)
    assert sorted(one) == sorted(two) == [(0, i) for i in range(24)] + [(1, i) for i in range(8)]
    assert one != two


def test_depends_on_nothing_but_seed_and_step() -> None:
    a, b = (Order([Supply(50)], batch=4, seed=1) for _ in range(2))
    b.keys(40), b.keys(3)
    assert [a.keys(s) for s in (0, 13, 26)] == [b.keys(s) for s in (0, 13, 26)]
    assert Order([Supply(50)], batch=4, seed=2).keys(0) != a.keys(0)


def test_last_batch_is_filled_from_the_start() -> None:
    order = Order([Supply(5)], batch=4, seed=0)
    keys = epoch(order, 0)
    assert order.steps_per_epoch == 2
    assert keys[5:] == keys[:3]
    assert len(Order([Supply(3)], batch=8, seed=0).keys(0)) == 8


def test_weight_takes_part_of_a_source_each_epoch() -> None:
    order = Order([Supply(10, weight=0.5), Supply(4, weight=2)], batch=13, seed=0)
    one, two = epoch(order, 0), epoch(order, 1)
    halves = [{i for s, i in keys if s == 0} for keys in (one, two)]
    assert halves[0] | halves[1] == set(range(10))
    assert Counter(k for k in one if k[0] == 1) == Counter({(1, i): 2 for i in range(4)})


def test_endless_source_never_repeats() -> None:
    order = Order([Supply(6, endless=True)], batch=3, seed=0)
    assert sorted(i for number in range(3) for _, i in epoch(order, number)) == list(range(18))


@pytest.mark.parametrize("batch", [4, 8])
def test_grouping_by_length(batch: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 800)
    grouped = Order([Supply(800, lengths=lengths)], batch=batch, seed=0, group_by_length=True)
    plain = Order([Supply(800, lengths=lengths)], batch=batch, seed=0)

    def waste(order: Order) -> float:
        rows = np.array([[lengths[i] for _, i in order.keys(s)] for s in range(order.steps_per_epoch)])
        return 1 - rows.sum() / (rows.max(1) * batch).sum()

    assert sorted(epoch(grouped, 0)) == sorted(epoch(plain, 0))
    assert waste(grouped) < 0.1 < waste(plain)
    first = [lengths[grouped.keys(s)[0][1]] for s in range(20)]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)
