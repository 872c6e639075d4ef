"""The feed: same batches whatever reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmamba.data.collate import Example
from vlmamba.data.loading import Feed, MicroBatches
from vlmamba.data.records import BadSampleError, Record
from vlmamba.data.sampling import Order, Supply


class Numbers:
    """A source whose sample i is a text of i + 2 tokens; sample 3 is bad."""

    supply = Supply(10)

    def record(self, index: int) -> Record:
        if index == 3:
            raise BadSampleError("sample 3: broken")
        return Record(id=str(index), text="x" * (index + 2))


def encode(record: Record) -> Example:
    assert record.text is not None
    ids = np.arange(len(record.text))
    return Example(record.id, ids, ids)


def make_feed(workers: int) -> Feed:
    source = Numbers()
    return Feed(MicroBatches([source], encode, pad_id=0), Order([source.supply], 4, seed=5), 2, workers)


def test_workers_change_nothing_and_a_feed_starts_anywhere() -> None:
    feeds = [make_feed(0), make_feed(2)]
    streams = [feed.batches(0) for feed in feeds]
    batches = [[next(stream) for _ in range(6)] for stream in streams]
    late = make_feed(0).batches(4)
    batches.append(batches[0][:4] + [next(late) for _ in range(2)])
    for feed in feeds:
        feed.close()
    for steps in zip(*batches, strict=True):
        for micro in zip(*steps, strict=True):
            assert len({b.ids for b in micro}) == 1
            assert all(torch.equal(b.input_ids, micro[0].input_ids) for b in micro)


def test_bad_samples_are_left_out_and_named() -> None:
    stream = make_feed(0).batches(0)
    read = [batch for _ in range(3) for batch in next(stream)]
    assert {reason for batch in read for reason in batch.skipped} == {"sample 3: broken"}
    assert sorted({int(i) for batch in read for i in batch.ids}) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_an_error_of_ours_is_no_bad_sample() -> None:
    feed = make_feed(0)
    feed.data.encode = lambda record: 1 / 0  # type: ignore[assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        next(feed.batches(0))
