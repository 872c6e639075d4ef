"""Entries of LLaVA files by number, read when asked for: a gigabyte of JSON costs 16 bytes a sample in each process."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlmamba.data.records import BadSampleError

_BETWEEN = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"


def require_file(file: Path) -> None:
    """ValueError unless the file is there."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected a LLaVA JSON (a list of id, image, conversations)")


class Entries:
    """The objects of a JSON list, or of JSON lines (`.jsonl`).

    Raises:
        ValueError: the file is missing or is not such a file; the message says where it breaks.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)
        require_file(self.file)
        content = self.file.read_bytes()
        self._fingerprint = hashlib.sha256(content).hexdigest()
        spans = _lines(content) if self.file.suffix == ".jsonl" else _items(content, self.file)
        self._spans = np.fromiter((n for span in spans for n in span), dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Any:
        """Entry `index`; BadSampleError for one that is not JSON (a damaged line)."""
        start, end = self._spans[index]
        with self.file.open("rb") as handle:
            handle.seek(start)
            text = handle.read(end - start)
        try:
            return json.loads(text)
        except ValueError as error:  # JSON or UTF-8
            raise BadSampleError(f"sample {index} of {self.file.name}: is not valid JSON: {error}") from None

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        """A hash of the file's content, as it was opened."""
        return self._fingerprint


def _lines(content: bytes) -> Iterator[tuple[int, int]]:
    """Start and end, in bytes, of every line that is not blank."""
    start = len(_BOM) if content.startswith(_BOM) else 0
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        if content[start:end].strip():
            yield start, end
        start = end + 1


def _items(content: bytes, file: Path) -> Iterator[tuple[int, int]]:
    """Start and end, in bytes, of every item of a JSON list.

    Bytes are read as Latin-1, one character each: the text is garbled and thrown away, the places are right.
    """
    text, decode = content.decode("latin-1"), json.JSONDecoder().raw_decode

    def skip(place: int) -> int:
        match = _BETWEEN.match(text, place)
        assert match is not None
        return match.end()

    place = skip(len(_BOM) if content.startswith(_BOM) else 0)
    if text[place : place + 1] != "[":
        begin = text[place : place + 20]
        raise ValueError(f"{file}: begins with {begin!r}; expected a list of samples (`[`); JSON lines go in *.jsonl")
    place, count = skip(place + 1), 0
    while text[place : place + 1] != "]":
        try:
            item, end = decode(text, place)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}, column {error.colno}"
            raise ValueError(f"{file}: is not valid JSON at {where} (after {count:,} samples): {error.msg}") from None
        if count == 0 and not isinstance(item, dict):
            raise ValueError(
                f"{file}: expected a list of samples (id, image, conversations); the first is {item!r:.60}"
            )
        yield place, end
        count, place = count + 1, skip(end)
        if text[place : place + 1] == ",":
            place = skip(place + 1)
        elif text[place : place + 1] != "]":
            found = repr(text[place : place + 20]) if place < len(text) else "the end of the file"
            raise ValueError(f"{file}: {found} after {count:,} samples, expected `,` or `]`; is the file complete?")
