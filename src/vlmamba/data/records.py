"""One training sample, and the reading of LLaVA's JSON files into it, dirt included."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

PLACEHOLDER = "<image>"


class BadSampleError(ValueError):
    """A sample that cannot be trained on: left out, counted and reported; never the end of a run by itself."""


@dataclass(frozen=True)
class Record:
    """A conversation about some images, or a plain text.

    Attributes:
        id: names the sample in reports.
        turns: (question, answer) pairs, without image placeholders: the images stand before the first question.
        images: what the conversation is about: files still to be read, or images made in memory.
        text: a document for the language model alone; then there are no turns.
    """

    id: str
    turns: tuple[tuple[str, str], ...] = ()
    images: tuple[Path | Image.Image, ...] = ()
    text: str | None = None


def read_llava(file: str | Path) -> list[dict[str, Any]]:
    """The entries of a LLaVA file: one JSON list, or JSON lines (`.jsonl`).

    Raises:
        ValueError: the file is missing or is not such a file; the message says where it breaks.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a LLaVA JSON (a list of id, image, conversations)")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            entries = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}: is not valid JSON at {place}: {error.msg}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: expected a list of samples (id, image, conversations)")
    return entries


def llava_record(entry: dict[str, Any], number: int, images: Path | None) -> Record:
    """One entry of a LLaVA file as a record.

    Turns before the first human one and pairs with an empty answer are dropped.

    Raises:
        BadSampleError: nothing is left to learn from, or images and placeholders do not match.
    """
    name = str(entry.get("id", number))
    files = entry.get("image") or []
    files = [files] if isinstance(files, str) else list(files)
    if files and images is None:
        raise BadSampleError(f"{name}: has an image ({files[0]}), but the source names no image folder")
    pairs = list(_pairs(entry.get("conversations") or []))
    marks = pairs[0][0].count(PLACEHOLDER) if pairs else 0
    if pairs and marks != len(files):
        raise BadSampleError(f"{name}: {marks} {PLACEHOLDER} in the first human turn, but {len(files)} image(s)")
    # The picture belongs to the conversation, so it stays when the first question has no answer.
    pairs[:1] = [(question.replace(PLACEHOLDER, "").strip(), answer) for question, answer in pairs[:1]]
    turns = tuple((question, answer) for question, answer in pairs if answer)
    if not turns:
        raise BadSampleError(f"{name}: no human turn with an answer")
    return Record(id=name, turns=turns, images=tuple(images / file for file in files) if images else ())


def _pairs(conversation: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """(question, answer) of every human turn with the answer right after it; an answer may be empty."""
    for asked, said in pairwise(conversation):
        if asked.get("from") == "human" and said.get("from") == "gpt":
            yield str(asked.get("value") or ""), str(said.get("value") or "").strip()


def llava_length(entry: dict[str, Any], image_tokens: int) -> int:
    """Rough length of an entry in tokens, to group samples of like length: four characters to a token."""
    characters = sum(len(str(turn.get("value") or "")) for turn in entry.get("conversations") or [])
    images = entry.get("image") or []
    return characters // 4 + image_tokens * (1 if isinstance(images, str) else len(images))
