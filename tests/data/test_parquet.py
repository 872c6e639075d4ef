"""Hugging Face parquet with images inside."""

from __future__ import annotations

import io
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dirt import talk
from PIL import Image

from vlmamba.data import parquet
from vlmamba.data.encoding import Encoder
from vlmamba.data.lengths import measure
from vlmamba.data.loading import open_feed
from vlmamba.data.parquet import ParquetRows
from vlmamba.data.records import BadSampleError
from vlmamba.data.sources import LlavaConfig, LlavaSource, ParquetSource, SourceConfig, open_source


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"pip install 'vlmamba\[parquet\]'"):
        open_source(SourceConfig(llava=LlavaConfig(str(tmp_path / "a.parquet"))))


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20 + number, 16), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows(count: int) -> list[dict[str, Any]]:
    """As Hugging Face stores them: every fifth without a picture, every third without an answer; row 4 with an empty
    picture, row 7 with a broken one."""
    damaged, made = {4: b"", 7: b"no image"}, []
    for i in range(count):
        image = {"bytes": damaged.get(i, png(i)), "path": f"{i}.png"} if i % 5 else None
        conversation = talk(("<image>\n" if image else "") + "What is this?", "A red square" * (i % 3))
        made.append({"id": f"r{i}", "image": image, "conversations": conversation})
    return made


@pytest.fixture
def write(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

    def write(name: str, made: list[dict[str, Any]], group: int = 4) -> Path:
        file = tmp_path / name
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), file, row_group_size=group)
        return file

    return write


def test_rows_are_those_of_the_same_json(write, tmp_path: Path, encoder: Encoder) -> None:
    made = rows(10)
    folder = write("train-0.parquet", made[:7]).parent
    write("train-1.parquet", made[7:])
    (tmp_path / "images").mkdir()
    for row in made:
        if row["image"]:
            (tmp_path / "images" / row["image"]["path"]).write_bytes(row["image"]["bytes"])
            row["image"] = row["image"]["path"]
    (tmp_path / "data.json").write_text(json.dumps(made))
    plain = LlavaSource(LlavaConfig(str(tmp_path / "data.json"), str(tmp_path / "images")))
    for name in (str(folder), str(folder / "train-*.parquet")):
        inside = open_source(SourceConfig(llava=LlavaConfig(name)))
        assert inside.supply.size == 10
        assert inside.supply.blocks == (4, 3, 3)
        good = 0
        for index in np.random.default_rng(0).permutation(10).tolist():
            try:
                expected = encoder(plain.record(index))
            except BadSampleError as problem:
                with pytest.raises(BadSampleError, match=str(problem).partition(":")[0]):
                    encoder(inside.record(index))
            else:
                example, good = encoder(inside.record(index)), good + 1
                assert np.array_equal(example.input_ids, expected.input_ids)
                assert all(np.array_equal(a, b) for a, b in zip(example.pixels, expected.pixels, strict=True))
        assert good == 4


def test_lengths_without_reading_a_picture(write, encoder: Encoder, monkeypatch) -> None:
    source = ParquetSource(LlavaConfig(str(write("a.parquet", rows(9)))))
    asked: list[list[str]] = []
    file = type(parquet._arrow().parquet.ParquetFile(source.rows.files[0]))
    read = file.read_row_group

    def note(self, number, columns, **options):
        asked.append(columns)
        return read(self, number, columns=columns, **options)

    monkeypatch.setattr(file, "read_row_group", note)
    table = measure(source, encoder)
    assert [columns[-1] for columns in asked] == ["image.path"] * 3
    assert table.within(400)[[1, 5]].tolist() == [len(encoder(source.record(i)).input_ids) for i in (1, 5)]
    assert table.lengths[0] == 0  # its answer is empty


@pytest.mark.parametrize("kind", ["texts", "messages", "bytes"])
def test_other_forms(write, encoder: Encoder, kind: str) -> None:
    one, other = {"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}
    row: dict[str, Any] = {
        "texts": {"images": [one, other], "texts": [{"user": "What differs?", "assistant": "The size"}] * 2},
        "messages": {
            "image": one,
            "messages": [
                {"role": "user", "content": "<image>What differs?"},
                {"role": "assistant", "content": "The size"},
            ],
        },
        "bytes": {"image": png(1), "conversations": talk("What differs?<image>", "The size")},
    }[kind]
    source = ParquetSource(LlavaConfig(str(write("a.parquet", [row, row]))))
    record = source.record(1)
    assert record.id == "1"
    assert record.turns == (("What differs?", "The size"),) * (2 if kind == "texts" else 1)
    assert len(encoder(record).pixels) == len(source.outline(1).images) == (2 if kind == "texts" else 1)


def test_few_row_groups_are_kept(write, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "MEMORY", 1)
    reader = ParquetRows(write("a.parquet", rows(40)))
    assert reader.span == 1
    for index in (1, 38, 2, 17):
        reader.record(index)
        assert len(reader._groups) == 1
    again = pickle.loads(pickle.dumps(reader))
    assert not again._groups
    assert again.record(2) == reader.record(2)


def test_mistakes(write, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"columns label, image; expected conversations"):
        ParquetRows(write("a.parquet", [{"label": 1, "image": b""}]))
    (tmp_path / "b.parquet").write_text("<html>")
    with pytest.raises(ValueError, match=r"b\.parquet: is not a parquet file"):
        ParquetRows(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="no such parquet file"):
        ParquetRows(tmp_path / "c*.parquet")


def test_a_feed_reads_it_packed_with_workers(write, encoder: Encoder) -> None:
    config = SourceConfig(llava=LlavaConfig(str(write("a.parquet", rows(30)))))
    feeds = [
        open_feed([config], replace(encoder), batch=4, micro_batch=2, seed=0, pack_into=800, workers=workers)
        for workers in (0, 2)
    ]
    streams = [feed.batches() for feed in feeds]
    read = [[batch.ids for _ in range(6) for batch in next(stream)] for stream in streams]
    for feed in feeds:
        feed.close()
    assert read[0] == read[1]
    silent, damaged = 10, 2
    assert len({name for ids in read[0] for name in ids}) == 30 - silent - damaged
