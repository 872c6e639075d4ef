"""A source of chance that draws what `random.Random` draws, number for number, with fewer calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, TypeVar

T = TypeVar("T")
_POOLED = 21  # up to here Random.sample takes from a list of what is left, whatever the number that it takes


class Chance(Random):
    """Thousands of small draws make a scene, and most of the time of each goes into calls within calls: here the bits
    are asked for where they are used. A number below n takes as many bits as n has, again until they fit."""

    def choice(self, seq: Sequence[T]) -> T:  # type: ignore[override]
        count = len(seq)
        bits = count.bit_length()
        place = self.getrandbits(bits)
        while place >= count > 0:
            place = self.getrandbits(bits)
        return seq[place]

    def randint(self, a: int, b: int) -> int:
        count = b - a + 1
        if count <= 0:
            raise ValueError(f"no number from {a} to {b}")
        bits = count.bit_length()
        number = self.getrandbits(bits)
        while number >= count:
            number = self.getrandbits(bits)
        return a + number

    def sample(self, population: Any, k: int, *, counts: Iterable[int] | None = None) -> list[Any]:
        size = len(population)
        if counts is not None or not 0 <= k <= size <= _POOLED:
            return super().sample(population, k, counts=counts)
        draw, pool, taken = self.getrandbits, list(population), []
        for left in range(size, size - k, -1):
            bits = left.bit_length()
            place = draw(bits)
            while place >= left:
                place = draw(bits)
            taken.append(pool[place])
            pool[place] = pool[left - 1]
        return taken
