"""The order of the data is a pure function of (seed, epoch, position)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlmamba.data.sampling import Key, Order, Supply, epoch_keys


def keys(order: Order, step: int) -> list[Key]:
    return [key for row in order.rows(step) for key in row]


def epoch(order: Order, number: int) -> list[Key]:
    first = number * order.steps_per_epoch
    return [key for step in range(first, first + order.steps_per_epoch) for key in keys(order, step)]


def test_every_sample_once_an_epoch_in_another_order() -> None:
    order = Order([Supply(24), Supply(8)], batch=8, seed=3)
    one, two = epoch(order, 0), epoch(order, 1)
    assert sorted(one) == sorted(two) == [(0, i) for i in range(24)] + [(1, i) for i in range(8)]
    assert one != two


def test_depends_on_nothing_but_seed_and_step() -> None:
    a, b = (Order([Supply(50)], batch=4, seed=1) for _ in range(2))
    b.rows(40), b.rows(3)
    assert [a.rows(s) for s in (0, 13, 26)] == [b.rows(s) for s in (0, 13, 26)]
    assert Order([Supply(50)], batch=4, seed=2).rows(0) != a.rows(0)


def test_last_batch_is_filled_from_the_start() -> None:
    order = Order([Supply(5)], batch=4, seed=0)
    read = epoch(order, 0)
    assert order.steps_per_epoch == 2
    assert read[5:] == read[:3]
    assert len(Order([Supply(3)], batch=8, seed=0).rows(0)) == 8


def test_weight_takes_part_of_a_source_each_epoch() -> None:
    order = Order([Supply(10, weight=0.5), Supply(4, weight=2)], batch=13, seed=0)
    one, two = epoch(order, 0), epoch(order, 1)
    halves = [{i for s, i in read if s == 0} for read in (one, two)]
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
        rows = np.array([[lengths[i] for _, i in keys(order, s)] for s in range(order.steps_per_epoch)])
        return 1 - rows.sum() / (rows.max(1) * batch).sum()

    assert sorted(epoch(grouped, 0)) == sorted(epoch(plain, 0))
    assert waste(grouped) < 0.1 < waste(plain)
    first = [lengths[keys(grouped, s)[0][1]] for s in range(20)]
    assert first != sorted(first)
    assert first != sorted(first, reverse=True)


def test_a_mixture_keeps_its_weights_all_along() -> None:
    """Any tenth of an epoch holds each source by its share, within four deviations of chance."""
    supplies = [Supply(4000), Supply(1000, weight=3), Supply(20000, weight=0.15), Supply(500, endless=True)]
    read = epoch_keys(supplies, seed=4, epoch=2)
    counts = np.array([4000, 3000, 3000, 500])
    assert np.array_equal(np.bincount(read[:, 0]), counts)
    shares = counts / counts.sum()
    for part in np.array_split(read[:, 0], 10):
        deviation = np.sqrt(len(part) * shares * (1 - shares))
        assert np.all(np.abs(np.bincount(part, minlength=4) - len(part) * shares) < 4 * deviation)


def test_steps_of_part_of_an_epoch() -> None:
    order = Order([Supply(100)], batch=10, seed=0)
    assert [order.steps(epochs) for epochs in (0.01, 0.5, 1, 2.5)] == [1, 5, 10, 25]


def test_blocks_are_read_together() -> None:
    """Samples of a file's row groups come near each other, a few groups at a time, in a mixture too."""
    file = Supply(1000, blocks=(100,) * 10, span=2)
    read = epoch_keys([file, Supply(500)], seed=0, epoch=0)
    mine = read[read[:, 0] == 0, 1]
    assert sorted(mine) == list(range(1000))
    spans = [set(part // 100) for part in mine.reshape(5, 200)]
    assert all(len(span) == 2 for span in spans)
    assert any(max(span) - min(span) > 1 for span in spans)
    assert np.all(np.bincount(read[:300, 0]) > 60)
    again = epoch_keys([file, Supply(500)], seed=0, epoch=1)
    assert not np.array_equal(read, again)
