"""Entries of JSON lists and JSON lines, by number."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmamba.data.entries import Entries
from vlmamba.data.records import BadSampleError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_what_was_written_is_read(tmp_path_factory, entries, ascii_only, indent, bom) -> None:
    folder = tmp_path_factory.mktemp("entries")
    mark = b"\xef\xbb\xbf" if bom else b""
    (folder / "a.json").write_bytes(mark + json.dumps(entries, ensure_ascii=ascii_only, indent=indent).encode())
    lines = "".join(json.dumps(entry, ensure_ascii=ascii_only) + "\r\n\n" for entry in entries)
    (folder / "a.jsonl").write_bytes(mark + lines.encode())
    assert list(Entries(folder / "a.json")) == list(Entries(folder / "a.jsonl")) == entries


def test_travels_to_other_processes_and_knows_its_content(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"id": 1}, {"id": 2}]')
    one = Entries(file)
    other = pickle.loads(pickle.dumps(one))
    assert other[1] == {"id": 2}
    assert other.fingerprint() == one.fingerprint()
    file.write_text('[{"id": 1}, {"id": 3}]')
    assert Entries(file).fingerprint() != one.fingerprint()


def test_a_damaged_line_is_one_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id": 1}\n{"id": \n{"id": "\xff"}\n{"id": 4}')
    entries = Entries(tmp_path / "a.jsonl")
    assert len(entries) == 4
    assert (entries[0], entries[3]) == ({"id": 1}, {"id": 4})
    for index in (1, 2):
        with pytest.raises(BadSampleError, match=rf"sample {index} of a\.jsonl: is not valid JSON"):
            entries[index]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{]", "line 1, column 3"),
        ('{"a": 1}', "expected a list"),
        ("[1]", "expected a list"),
        ("", "expected a list"),
        ('[{"a": 1},\n {"b": ', r"line 2, column \d+ \(after 1 samples\)"),
        ('[{"a": 1}', "the end of the file after 1 samples, expected `,` or `]`; is the file complete"),
        ('[{"a": 1} {"b": 2}]', "after 1 samples, expected `,`"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        Entries(tmp_path / "a.json")
    with pytest.raises(ValueError, match="no such file"):
        Entries(tmp_path / "b.json")
