"""The order of the data: a pure function of (seed, epoch, position), the same whatever reads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GROUP = 50
"""Batches among which samples are sorted by length: long enough to even out, short enough to stay random."""

Key = tuple[int, int]
"""Which sample: (source, index in it)."""


@dataclass(frozen=True)
class Supply:
    """What the order needs to know of a source.

    Attributes:
        size: samples in one pass.
        weight: passes per epoch; 0.5 takes half of it in one epoch and the other half in the next.
        endless: index goes on for ever (each sample new) instead of starting again, shuffled, after `size`.
        lengths: tokens of each sample, roughly, to group by; None if unknown.
    """

    size: int
    weight: float = 1.0
    endless: bool = False
    lengths: np.ndarray | None = None

    @property
    def per_epoch(self) -> int:
        return max(1, round(self.size * self.weight))


class Order:
    """Which samples the global batch of each step holds.

    Args:
        supplies: one per source.
        batch: samples in a global batch.
        seed: everything follows from it.
        group_by_length: batches of samples of like length (sources without lengths count as equally long).
    """

    def __init__(self, supplies: list[Supply], batch: int, seed: int, group_by_length: bool = False):
        self.supplies, self.batch, self.seed, self.group_by_length = supplies, batch, seed, group_by_length
        self.samples = sum(s.per_epoch for s in supplies)
        self.steps_per_epoch = -(-self.samples // batch)
        self._epoch, self._table = -1, np.empty((0, 0, 2), dtype=np.int64)

    def keys(self, step: int) -> list[Key]:
        """The samples of global step `step`, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._table = epoch, self._plan(epoch)
        return [(int(source), int(index)) for source, index in self._table[position]]

    def _plan(self, epoch: int) -> np.ndarray:
        """(steps, batch, 2): every batch of one epoch. The last batch is filled up from the epoch's own start."""
        keys = np.concatenate([self._share(i, supply, epoch) for i, supply in enumerate(self.supplies)])
        random = np.random.default_rng((self.seed, epoch))
        keys = keys[random.permutation(len(keys))]
        keys = np.resize(keys, (self.steps_per_epoch * self.batch, 2))
        if self.group_by_length:
            keys = self._grouped(keys, random)
        return keys.reshape(self.steps_per_epoch, self.batch, 2)

    def _share(self, number: int, supply: Supply, epoch: int) -> np.ndarray:
        """(n, 2): what this epoch takes from one source, in the source's own order."""
        first = epoch * supply.per_epoch
        stream = np.arange(first, first + supply.per_epoch)
        if not supply.endless:
            passes, places = np.divmod(stream, supply.size)
            index = np.empty_like(stream)
            for one in np.unique(passes):
                chosen = passes == one
                shuffled = np.random.default_rng((self.seed, number, int(one), 1)).permutation(supply.size)
                index[chosen] = shuffled[places[chosen]]
            stream = index
        return np.stack([np.full_like(stream, number), stream], axis=1)

    def _grouped(self, keys: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Sorts by length within groups of batches, then shuffles the batches."""
        lengths = np.zeros(len(keys), dtype=np.int64)
        for number, supply in enumerate(self.supplies):
            if supply.lengths is not None:
                mine = keys[:, 0] == number
                lengths[mine] = supply.lengths[keys[mine, 1] % supply.size]
        span = GROUP * self.batch
        order = np.concatenate(
            [start + np.argsort(-lengths[start : start + span], kind="stable") for start in range(0, len(keys), span)]
        )
        batches = keys[order].reshape(-1, self.batch, 2)
        return batches[random.permutation(len(batches))]
