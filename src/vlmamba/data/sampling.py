"""The order of the data: a pure function of (seed, epoch, position), the same whatever reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

GROUP = 50
"""Batches among which samples are sorted by length: long enough to even out, short enough to stay random."""

Key = tuple[int, int]
"""Which sample: (source, index in it)."""

Row = list[Key]
"""The samples that share one row of a batch."""


@dataclass(frozen=True)
class Supply:
    """What the order needs to know of a source.

    Attributes:
        size: samples in one pass.
        weight: passes per epoch; 0.5 takes half of it in one epoch and the other half in the next.
        endless: index goes on for ever (each sample new) instead of starting again, shuffled, after `size`.
        lengths: tokens of each sample (0: it cannot be used); None if unknown.
        blocks: sizes of the stretches that are cheap to read together (row groups of a file); None if any order is.
        span: blocks that are read at a time, and among which samples are shuffled.
    """

    size: int
    weight: float = 1.0
    endless: bool = False
    lengths: np.ndarray | None = None
    blocks: tuple[int, ...] | None = None
    span: int = 1

    @property
    def per_epoch(self) -> int:
        return max(1, round(self.size * self.weight))

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Tokens of these samples; zeros where unknown."""
        if self.lengths is None:
            return np.zeros(len(indices), dtype=np.int64)
        return self.lengths[indices % self.size]


class Ordering(Protocol):
    """What a feed needs to know of an order.

    Attributes:
        batch: rows in a global batch.
        steps_per_epoch: of the first epoch.
    """

    batch: int

    @property
    def steps_per_epoch(self) -> int: ...

    def rows(self, step: int) -> list[Row]:
        """The rows of global step `step`, counted from 0 over all epochs."""
        ...

    def steps(self, epochs: float) -> int:
        """Steps that this many epochs take, at least one."""
        ...


class Order:
    """Which samples the global batch of each step holds, one to a row.

    Args:
        supplies: one per source.
        batch: samples in a global batch.
        seed: everything follows from it.
        group_by_length: batches of samples of like length (sources without lengths count as equally long).
    """

    def __init__(self, supplies: Sequence[Supply], batch: int, seed: int, group_by_length: bool = False):
        self.supplies, self.batch, self.seed, self.group_by_length = tuple(supplies), batch, seed, group_by_length
        self.samples = sum(s.per_epoch for s in supplies)
        self.steps_per_epoch = -(-self.samples // batch)
        self._epoch, self._table = -1, np.empty((0, 0, 2), dtype=np.int64)

    def rows(self, step: int) -> list[Row]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._table = epoch, self._plan(epoch)
        return [[(int(source), int(index))] for source, index in self._table[position]]

    def steps(self, epochs: float) -> int:
        return max(1, round(self.steps_per_epoch * epochs))

    def _plan(self, epoch: int) -> np.ndarray:
        """(steps, batch, 2): every batch of one epoch. The last batch is filled up from the epoch's own start."""
        keys = epoch_keys(self.supplies, self.seed, epoch)
        keys = np.resize(keys, (self.steps_per_epoch * self.batch, 2))
        if self.group_by_length:
            keys = self._grouped(keys, np.random.default_rng((self.seed, epoch, 2)))
        return keys.reshape(self.steps_per_epoch, self.batch, 2)

    def _grouped(self, keys: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Sorts by length within groups of batches, and shuffles the batches of each group."""
        lengths, span = lengths_of(self.supplies, keys), GROUP * self.batch
        groups = []
        for start in range(0, len(keys), span):
            longest_first = start + np.argsort(-lengths[start : start + span], kind="stable")
            batches = keys[longest_first].reshape(-1, self.batch, 2)
            groups.append(batches[random.permutation(len(batches))])
        return np.concatenate(groups)


def epoch_keys(supplies: Sequence[Supply], seed: int, epoch: int) -> np.ndarray:
    """(n, 2): source and index of every sample of an epoch, in random order.

    Each source is shuffled by itself and the sources are then dealt out at random. That is as random as shuffling them
    together, and it keeps neighbours of a source near each other where `Supply.blocks` asks for it.
    """
    shares = [_share(number, supply, seed, epoch) for number, supply in enumerate(supplies)]
    dealt = np.repeat(np.arange(len(shares)), [len(share) for share in shares])
    dealt = dealt[np.random.default_rng((seed, epoch)).permutation(len(dealt))]
    keys = np.stack([dealt, np.empty_like(dealt)], axis=1)
    for number, share in enumerate(shares):
        keys[dealt == number, 1] = share
    return keys


def lengths_of(supplies: Sequence[Supply], keys: np.ndarray) -> np.ndarray:
    """(n,): tokens of the samples `keys` (n, 2); zeros where unknown."""
    lengths = np.zeros(len(keys), dtype=np.int64)
    for number, supply in enumerate(supplies):
        mine = keys[:, 0] == number
        lengths[mine] = supply.lengths_of(keys[mine, 1])
    return lengths


def _share(number: int, supply: Supply, seed: int, epoch: int) -> np.ndarray:
    """(n,): what an epoch takes from one source, in the source's own order."""
    first = epoch * supply.per_epoch
    stream = np.arange(first, first + supply.per_epoch)
    if supply.endless:
        return stream
    passes, places = np.divmod(stream, supply.size)
    for one in np.unique(passes):
        chosen = passes == one
        stream[chosen] = _shuffled(supply, np.random.default_rng((seed, number, int(one), 1)))[places[chosen]]
    return stream


def _shuffled(supply: Supply, random: np.random.Generator) -> np.ndarray:
    """(size,): the indices of one pass. With blocks: the blocks shuffled, and the samples of each `span` of them."""
    if supply.blocks is None:
        return random.permutation(supply.size)
    starts = np.concatenate([[0], np.cumsum(supply.blocks)])
    order = random.permutation(len(supply.blocks))
    spans = []
    for first in range(0, len(order), supply.span):
        indices = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in order[first : first + supply.span]])
        spans.append(indices[random.permutation(len(indices))])
    return np.concatenate(spans)
