"""From a plan of samples to micro-batches, read and tokenised by worker processes in the plan's order."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler

from vlmamba.data.collate import Batch, Example, collate
from vlmamba.data.records import BadSampleError, Record
from vlmamba.data.sampling import Key, Order
from vlmamba.data.sources import Source

Encode = Callable[[Record], Example]


@dataclass
class MicroBatches(Dataset):
    """Keys of one micro-batch to the batch itself; what cannot be used is left out and named in it."""

    sources: list[Source]
    encode: Encode
    pad_id: int
    pack_into: int | None = None

    def __getitem__(self, keys: list[Key]) -> Batch:
        examples, skipped = [], []
        for source, index in keys:
            try:
                examples.append(self.encode(self.sources[source].record(index)))
            except BadSampleError as problem:
                skipped.append(str(problem))
        return collate(examples, self.pad_id, self.pack_into, tuple(skipped))


@dataclass
class Plan(Sampler):
    """The keys of every micro-batch from a step on, without end."""

    order: Order
    micro_batch: int
    first_step: int = 0

    def __iter__(self) -> Iterator[list[Key]]:
        step = self.first_step
        while True:
            keys = self.order.keys(step)
            for start in range(0, len(keys), self.micro_batch):
                yield keys[start : start + self.micro_batch]
            step += 1


class Feed:
    """Global batches by step: lists of micro-batches, the same whatever the number of workers.

    Args:
        workers: processes that read ahead; 0 reads in this one.
        pinned: copy batches to page-locked memory, for a device.
        ahead: micro-batches that each worker prepares in advance.
    """

    def __init__(
        self, data: MicroBatches, order: Order, micro_batch: int, workers: int = 0, pinned: bool = False, ahead: int = 3
    ):
        self.data, self.order, self.micro_batch = data, order, micro_batch
        self.workers, self.pinned, self.ahead = workers, pinned, ahead
        self._iterator: Iterator[Any] | None = None

    def batches(self, first_step: int = 0) -> Iterator[list[Batch]]:
        """The global batches from `first_step` on, without end."""
        loader = DataLoader(
            self.data,
            batch_size=None,
            sampler=Plan(self.order, self.micro_batch, first_step),
            num_workers=self.workers,
            pin_memory=self.pinned,
            prefetch_factor=self.ahead if self.workers else None,
            worker_init_fn=_ignore_signals,
            multiprocessing_context=_context() if self.workers else None,
        )
        self._iterator = iterator = iter(loader)
        per_step = -(-self.order.batch // self.micro_batch)
        while True:
            yield list(islice(iterator, per_step))

    def close(self) -> None:
        """Ends the workers."""
        if self._iterator is not None and hasattr(self._iterator, "_shutdown_workers"):
            self._iterator._shutdown_workers()
        self._iterator = None


def _context() -> Any:
    # A forked worker starts at once, with the sources and the tokenizer in memory. Only Linux forks safely.
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of the group; only the main one decides what they mean."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
