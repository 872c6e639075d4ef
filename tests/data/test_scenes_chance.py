"""The scenes' own source of chance draws what Python's does."""

from __future__ import annotations

from random import Random

import pytest

from vlmamba.data.scenes.chance import Chance


@pytest.mark.parametrize("seed", [0, 7, "1/train/12"])
def test_the_same_numbers(seed: int | str) -> None:
    ours, theirs = Chance(seed), Random(seed)
    for size in (*range(1, 24), 90):
        items = list(range(size))
        for draw in (
            lambda rng, items=items: rng.choice(items),
            lambda rng, size=size: rng.randint(-3, size),
            lambda rng, items=items, size=size: rng.sample(items, min(3, size)),
            lambda rng, items=items: rng.sample(tuple(items), len(items)),
            lambda rng, items=items: rng.shuffle(list(items)),
            lambda rng, size=size: rng.randrange(size),
        ):
            assert draw(ours) == draw(theirs)
    assert ours.getstate() == theirs.getstate()


def test_where_nothing_can_be_drawn() -> None:
    rng = Chance(0)
    with pytest.raises(IndexError):
        rng.choice(())
    with pytest.raises(ValueError, match=r"[Ss]ample"):
        rng.sample([1, 2], 3)
    with pytest.raises(ValueError, match="from 3 to 2"):
        rng.randint(3, 2)
