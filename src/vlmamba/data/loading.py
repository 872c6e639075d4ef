"""From a plan of samples to micro-batches, read and tokenised by worker processes in the plan's order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlmamba.data.collate import Batch, Example, collate
from vlmamba.data.encoding import Encoder
from vlmamba.data.lengths import measured
from vlmamba.data.packing import PackedOrder, best_fit, rows_for
from vlmamba.data.processes import context
from vlmamba.data.records import BadSampleError, Record
from vlmamba.data.sampling import Key, Order, Ordering, Row
from vlmamba.data.sources import Source, SourceConfig, open_source

Encode = Callable[[Record], Example]
_AHEAD = 3  # micro-batches that each worker prepares in advance


@dataclass
class MicroBatches(Dataset):
    """Rows of keys to the micro-batch itself; what cannot be used is left out and named in it.

    Args:
        pack_into: tokens of a row that may hold several samples; None for one sample to a row.
        planned: the rows are packs. Otherwise, with `pack_into`, the samples of a micro-batch are packed as they come,
            their lengths not being known before.
    """

    sources: Sequence[Source]
    encode: Encode
    pad_id: int
    pack_into: int | None = None
    planned: bool = False

    def __getitem__(self, keys: list[Row]) -> Batch:
        skipped: list[str] = []
        rows = [[example for key in row if (example := self._example(key, skipped)) is not None] for row in keys]
        packed = self.pack_into is not None
        if not self.planned:  # one sample to a row: a row without its sample goes
            rows = [row for row in rows if row]
            if self.pack_into is not None:
                examples = [example for row in rows for example in row]
                packs = best_fit([len(example.input_ids) for example in examples], self.pack_into)
                rows = [[examples[i] for i in pack] for pack in packs]
        return collate(rows, self.pad_id, packed=packed, budget=self.pack_into, skipped=skipped)

    def _example(self, key: Key, skipped: list[str]) -> Example | None:
        source, index = key
        try:
            return self.encode(self.sources[source].record(index))
        except BadSampleError as problem:
            skipped.append(str(problem))
            return None


@dataclass
class Plan(Sampler):
    """The rows of every micro-batch from a step on, without end: of all, or of one rank's share."""

    order: Ordering
    micro_batch: int
    first_step: int = 0
    rank: int = 0
    world: int = 1

    def __iter__(self) -> Iterator[list[Row]]:
        step = self.first_step
        while True:
            rows = self.order.rows(step)
            for start in range(self.rank * self.micro_batch, len(rows), self.world * self.micro_batch):
                yield rows[start : start + self.micro_batch]
            step += 1


class Feed:
    """Global batches by step: lists of micro-batches, the same whatever the number of workers.

    With several ranks, each gets every `world`-th micro-batch: together they read what one alone would.

    Args:
        micro_batch: rows of a micro-batch.
        workers: processes that read ahead; 0 reads in this one.
        pinned: copy batches to page-locked memory, for a device.

    Raises:
        ValueError: the micro-batches of a step cannot be dealt out evenly.
    """

    def __init__(
        self,
        data: MicroBatches,
        order: Ordering,
        micro_batch: int,
        workers: int = 0,
        pinned: bool = False,
        rank: int = 0,
        world: int = 1,
    ):
        self.data, self.order, self.micro_batch = data, order, micro_batch
        self.workers, self.pinned, self.rank, self.world = workers, pinned, rank, world
        self.per_step, rest = divmod(-(-order.batch // micro_batch), world)
        if rest:
            raise ValueError(
                f"{-(-order.batch // micro_batch)} micro-batches a step cannot be dealt out to {world} processes; "
                "choose a global batch that is a multiple of micro-batch times processes"
            )
        self._iterator: Iterator[Any] | None = None

    def batches(self, first_step: int = 0) -> Iterator[list[Batch]]:
        """The global batches from `first_step` on (this rank's share of them), without end."""
        loader = DataLoader(
            self.data,
            batch_size=None,
            sampler=Plan(self.order, self.micro_batch, first_step, self.rank, self.world),
            num_workers=self.workers,
            pin_memory=self.pinned,
            prefetch_factor=_AHEAD if self.workers else None,
            worker_init_fn=_settle,
            multiprocessing_context=context() if self.workers else None,
            generator=torch.Generator(),  # a loader draws a seed for its workers: not from the run's own numbers
        )
        self._iterator = iterator = iter(loader)
        while True:
            yield list(islice(iterator, self.per_step))

    def describe(self) -> str:
        """What is read, in a line."""
        samples = sum(source.supply.per_epoch for source in self.data.sources)
        text = f"{samples:,} samples an epoch from {len(self.data.sources)} source(s)"
        if isinstance(self.order, PackedOrder):
            text += (
                f", packed into rows of {self.order.budget} tokens: {self.micro_batch} rows a micro-batch, "
                f"{self.order.samples_per_step:.1f} samples a step, {self.order.padding:.2%} padding"
            )
        return text

    def close(self) -> None:
        """Ends the workers."""
        if self._iterator is not None and hasattr(self._iterator, "_shutdown_workers"):
            self._iterator._shutdown_workers()
        self._iterator = None


def open_feed(
    configs: Sequence[SourceConfig],
    encoder: Encoder,
    *,
    batch: int,
    micro_batch: int,
    seed: int,
    pack_into: int | None = None,
    group_by_length: bool = False,
    workers: int = 0,
    pinned: bool = False,
    cache: Path | None = None,
    rank: int = 0,
    world: int = 1,
) -> Feed:
    """The feed of a run.

    Args:
        batch, micro_batch: samples of a global batch and of a micro-batch; when packed, on average: as many rows as
            hold about `micro_batch` samples make a micro-batch.
        pack_into: tokens of a row that holds several samples; None for one sample to a row. Packs are planned where
            all lengths can be known (files); where samples are made as they are read (scenes), those of a micro-batch
            are packed as they come.
        group_by_length: batches of samples of like length; packs need none.
        cache: folder for tables of lengths that cannot be kept beside the data.
        rank, world: which process of how many this is.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are processes already
    sources = [open_source(config) for config in configs]
    supplies = [source.supply for source in sources]
    if pack_into is not None or group_by_length:
        supplies = [measured(source, encoder, workers, cache) for source in sources]
    order: Ordering
    if pack_into is not None and all(supply.lengths is not None for supply in supplies):
        rows = rows_for(micro_batch, supplies, pack_into)
        order = PackedOrder(supplies, pack_into, rows * (batch // micro_batch), seed)
    else:
        rows = micro_batch
        order = Order(supplies, batch, seed, group_by_length and pack_into is None)
    planned = isinstance(order, PackedOrder)
    data = MicroBatches(sources, encoder, encoder.processor.tokenizer.pad_token_id, pack_into, planned)
    return Feed(data, order, rows, workers, pinned, rank=rank, world=world)


def _settle(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process of the group; only the main one decides what they mean.

    Batches go to the main process by the name of shared memory. For handles to it both sides would have to talk, which
    a worker busy with Python is slow to do: 7 ms a batch, one batch after another whatever the number of workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.multiprocessing.set_sharing_strategy("file_system")
