"""The feed: same batches whatever reads them, packed or not, one rank or several."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from dirt import BAD, GOOD

from vlmamba.data.collate import Batch, Example
from vlmamba.data.encoding import Encoder
from vlmamba.data.loading import Feed, MicroBatches, open_feed
from vlmamba.data.packing import PackedOrder
from vlmamba.data.records import BadSampleError, Record
from vlmamba.data.sampling import Order, Supply
from vlmamba.data.sources import LlavaConfig, ScenesConfig, SourceConfig


class Numbers:
    """A source whose sample i is a text of i + 2 tokens; sample 3 is bad."""

    supply = Supply(10)
    name = Path("numbers")

    def record(self, index: int) -> Record:
        if index == 3:
            raise BadSampleError("sample 3: broken")
        return Record(id=str(index), text="x" * (index + 2))

    outline = record

    def fingerprint(self) -> str:
        return "numbers"


def encode(record: Record) -> Example:
    assert record.text is not None
    ids = np.arange(len(record.text))
    return Example(record.id, ids, ids)


def make_feed(workers: int = 0, rank: int = 0, world: int = 1) -> Feed:
    source = Numbers()
    order = Order([source.supply], 4, seed=5)
    return Feed(MicroBatches([source], encode, pad_id=0), order, 2, workers, rank=rank, world=world)


def read(feed: Feed, steps: int, first: int = 0) -> list[list[Batch]]:
    batches = list(islice(feed.batches(first), steps))
    feed.close()
    return batches


def same(one: list[list[Batch]], other: list[list[Batch]]) -> None:
    assert len(one) == len(other)
    for steps in zip(one, other, strict=True):
        for a, b in zip(*steps, strict=True):
            assert (a.ids, a.skipped) == (b.ids, b.skipped)
            for name in ("input_ids", "labels", "seq_idx", "pixels"):
                x, y = getattr(a, name), getattr(b, name)
                assert (x is None and y is None) or torch.equal(x, y), name


def test_bad_samples_are_left_out_and_named() -> None:
    batches = [batch for step in read(make_feed(), 3) for batch in step]
    assert {reason for batch in batches for reason in batch.skipped} == {"sample 3: broken"}
    assert sorted({int(i) for batch in batches for i in batch.ids}) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_an_error_of_ours_is_no_bad_sample() -> None:
    feed = make_feed()
    feed.data.encode = lambda record: 1 / 0  # type: ignore[assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        next(feed.batches(0))


def test_ranks_share_the_micro_batches_of_one() -> None:
    alone = read(make_feed(), 5)
    ranks = [read(make_feed(rank=rank, world=2), 5) for rank in (0, 1)]
    same(alone, [[one, other] for (one,), (other,) in zip(*ranks, strict=True)])
    with pytest.raises(ValueError, match="2 micro-batches a step cannot be dealt out to 3 processes"):
        make_feed(world=3)


@pytest.fixture
def mixture(dirty: Path):
    """A dirty file, the same file again, every second time, and (asked for) scenes: how a feed over them is opened."""
    llava = LlavaConfig(str(dirty / "data.json"), str(dirty))
    files = [SourceConfig(llava=llava), SourceConfig(llava=llava, weight=0.5)]
    scenes = SourceConfig(scenes=ScenesConfig(questions=1), size=6)

    def make(encoder: Encoder, with_scenes: bool = False, **options) -> Feed:
        configs = [*files, scenes] if with_scenes else files
        return open_feed(configs, encoder, **{"batch": 8, "micro_batch": 4, "seed": 3} | options)

    return make


@pytest.mark.parametrize(
    "options",
    [{}, {"pack_into": 800}, {"pack_into": 600, "with_scenes": True}, {"group_by_length": True}],
    ids=["plain", "packed", "packed as they come", "by length"],
)
def test_workers_change_nothing_and_a_feed_starts_at_any_step(mixture, encoder, options) -> None:
    alone = read(mixture(encoder, **options), 10)
    same(alone, read(mixture(encoder, workers=2, **options), 10))
    same(alone[7:], read(mixture(encoder, workers=1, **options), 3, first=7))


def test_planned_packs_hold_what_they_should(mixture, encoder) -> None:
    feed = mixture(encoder, pack_into=800)
    assert isinstance(feed.order, PackedOrder)
    epoch = [batch for step in read(feed, feed.order.steps_per_epoch) for batch in step]
    for batch in epoch:
        assert batch.seq_idx is not None
        assert batch.input_ids.shape[1] <= 800
        assert batch.num_tokens == int((batch.seq_idx >= 0).sum())
        images = int((batch.input_ids == encoder.processor.image_token_id).sum()) // 4
        assert images == (0 if batch.pixels is None else len(batch.pixels))
    met = Counter(name for batch in epoch for name in batch.ids)
    assert set(met) == set(GOOD)
    reasons = {reason.partition(":")[0] for batch in epoch for reason in batch.skipped}
    assert reasons == {*BAD, "sample 19"}
    text = feed.describe()
    assert "30 samples an epoch from 2 source(s), packed into rows of 800 tokens" in text
    assert "padding" in text


def test_samples_made_as_they_are_read_are_packed_as_they_come(mixture, encoder) -> None:
    feed = mixture(encoder, with_scenes=True, pack_into=600)
    assert isinstance(feed.order, Order)
    batches = [batch for step in read(feed, 4) for batch in step]
    assert any(len(batch.ids) > len(batch.input_ids) for batch in batches)
    assert any(name.startswith("scene-") for batch in batches for name in batch.ids)


def test_grouping_uses_exact_lengths(mixture, encoder) -> None:
    grouped, plain = (mixture(encoder, group_by_length=group, micro_batch=8) for group in (True, False))

    def waste(feed: Feed) -> float:
        batches = [batch for step in read(feed, feed.order.steps_per_epoch) for batch in step]
        return 1 - sum(b.num_tokens for b in batches) / sum(b.input_ids.numel() for b in batches)

    assert waste(grouped) < waste(plain)
