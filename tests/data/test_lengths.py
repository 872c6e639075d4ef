"""Tables of lengths: exact, kept, and never another's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from dirt import talk
from PIL import Image

from vlmamba.data import lengths
from vlmamba.data.encoding import Encoder
from vlmamba.data.lengths import LengthTable, length_table, measure, measured
from vlmamba.data.records import BadSampleError
from vlmamba.data.sources import LlavaConfig, LlavaSource, ScenesConfig, ScenesSource


@pytest.fixture
def source(dirty: Path) -> LlavaSource:
    return LlavaSource(LlavaConfig(str(dirty / "data.json"), str(dirty)))


@pytest.mark.parametrize("max_length", [400, 260, 200, 150, 20])
def test_lengths_are_those_of_the_examples(source: LlavaSource, encoder: Encoder, max_length: int) -> None:
    cut, picture = replace(encoder, max_length=max_length), Image.new("RGB", (20, 16))

    def length(index: int) -> int:
        try:
            record = source.record(index)
            # What is only wrong with a picture cannot be known before it is read.
            return len(cut(replace(record, images=(picture,) * len(record.images))).input_ids)
        except BadSampleError:
            return 0

    found = measure(source, encoder).within(max_length).tolist()
    assert found == [length(index) for index in range(len(found))]
    assert max_length == 20 or any(found)


def test_least_length_is_the_first_that_learns(source: LlavaSource, encoder: Encoder) -> None:
    table = measure(source, encoder)
    record, least = source.record(0), int(table.least[0])
    replace(encoder, max_length=least)(record)
    with pytest.raises(BadSampleError):
        replace(encoder, max_length=least - 1)(record)


def test_processes_measure_the_same(tmp_path: Path, encoder: Encoder, monkeypatch, capsys) -> None:
    entries = [{"conversations": talk("What is this?", "A red square " * (i % 7))} for i in range(600)]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    source = LlavaSource(LlavaConfig(str(tmp_path / "a.json")))
    alone = measure(source, encoder)
    monkeypatch.setattr(lengths, "_CHUNK", 50)
    together = measure(source, encoder, workers=2)
    assert "600 samples measured" in capsys.readouterr().err
    assert np.array_equal(alone.lengths, together.lengths)
    assert np.array_equal(alone.least, together.least)
    assert (alone.lengths == 0).sum() == 86  # 600 / 7: the empty answers


def test_a_table_is_built_once(source: LlavaSource, encoder: Encoder, monkeypatch) -> None:
    first = length_table(source, encoder)
    (file,) = source.name.parent.glob("data.json.lengths-*.npz")
    monkeypatch.setattr(lengths, "measure", lambda *_: pytest.fail("measured again"))
    again = length_table(source, replace(encoder, max_length=100))
    assert np.array_equal(first.lengths, again.lengths)
    assert np.array_equal(LengthTable.load(file).least, first.least)


@pytest.mark.parametrize("left", [0, 50, 300])
def test_a_damaged_table_is_measured_again(source: LlavaSource, encoder: Encoder, left: int) -> None:
    first = length_table(source, encoder)
    (file,) = source.name.parent.glob("data.json.lengths-*.npz")
    file.write_bytes(file.read_bytes()[:left])
    assert np.array_equal(length_table(source, encoder).lengths, first.lengths)
    assert np.array_equal(LengthTable.load(file).lengths, first.lengths)


@pytest.mark.parametrize("change", ["data", "template", "tokenizer", "image tokens"])
def test_a_table_is_never_another_s(source: LlavaSource, encoder: Encoder, change: str) -> None:
    length_table(source, encoder)
    if change == "data":
        source.name.write_text(source.name.read_text().replace("A red square", "A red circle"))
        source = LlavaSource(LlavaConfig(str(source.name), str(source.images)))
    elif change == "template":
        encoder = replace(encoder, template="plain")
    elif change == "tokenizer":
        encoder.processor.tokenizer.add_tokens(["square"])
    else:
        encoder.processor.vision_cls = True
    length_table(source, encoder)
    assert len(list(source.name.parent.glob("data.json.lengths-*.npz"))) == 2


def test_where_the_data_s_folder_cannot_be_written(source, encoder, tmp_path, monkeypatch) -> None:
    save = LengthTable.save

    def refuse(table: LengthTable, file: Path) -> None:
        if file.parent == source.name.parent:
            raise PermissionError("read-only")
        save(table, file)

    monkeypatch.setattr(LengthTable, "save", refuse)
    length_table(source, encoder, cache=tmp_path / "run")
    assert len(list((tmp_path / "run").glob("*.npz"))) == 1
    monkeypatch.setattr(lengths, "measure", lambda *_: pytest.fail("measured again"))
    length_table(source, encoder, cache=tmp_path / "run")


def test_scenes_have_no_table(encoder: Encoder) -> None:
    source = ScenesSource(ScenesConfig(), 10)
    assert measured(source, encoder) == source.supply
