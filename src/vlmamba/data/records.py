"""One training sample, and the reading of LLaVA's conversations into it, dirt included."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from vlmamba.data.scenes.marks import Mark

PLACEHOLDER = "<image>"
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".JPG", ".JPEG", ".PNG")
"""Under which a picture may lie that the data name by another."""

Picture: TypeAlias = Path | bytes | Image.Image
"""A file still to be read, the content of one, or a picture made in memory."""

_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class BadSampleError(ValueError):
    """A sample that cannot be trained on: left out, counted and reported; never the end of a run by itself."""


@dataclass(frozen=True)
class Record:
    """A conversation about some images, or a plain text.

    Attributes:
        id: names the sample in reports.
        turns: (question, answer) pairs, without image placeholders: the images stand before the first question.
        images: what the conversation is about.
        text: a document for the language model alone; then there are no turns.
        marks: what lies where in the one image, for an encoder alone; then there are no turns either.
    """

    id: str
    turns: tuple[tuple[str, str], ...] = ()
    images: tuple[Picture, ...] = ()
    text: str | None = None
    marks: tuple[Mark, ...] | None = None


def llava_record(entry: Any, number: int, images: Path | None) -> Record:
    """One entry of a LLaVA file as a record.

    Args:
        number: stands for the id of an entry that has none.
        images: the folder that the entry's paths start from.

    Raises:
        BadSampleError: nothing is left to learn from, or images and placeholders do not match.
    """
    if not isinstance(entry, dict):
        raise BadSampleError(f"sample {number}: is {entry!r:.60}; expected an object with id, image, conversations")
    name = str(entry.get("id", number))
    files = image_files(entry, name)
    if files and images is None:
        raise BadSampleError(f"{name}: has an image ({files[0]}), but the source names no image folder")
    conversation = entry.get("conversations") or entry.get("messages") or []
    return conversation_record(name, conversation, [images / file for file in files] if images else [])


def image_files(entry: dict[str, Any], name: str) -> list[str]:
    """The paths in `image` (or `images`) of an entry: one, several or none."""
    files = entry.get("image") or entry.get("images") or []
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) and file for file in files):
        raise BadSampleError(f"{name}: image is {files!r:.60}; expected a path or a list of paths")
    return files


def conversation_record(name: str, conversation: Any, pictures: Sequence[Picture]) -> Record:
    """A conversation in LLaVA's form (`from`, `value`) or in chat form (`role`, `content`) about some pictures.

    Turns before the first human one and pairs with an empty answer are dropped; `<image>` is taken out, as the
    pictures go before the first question.

    Raises:
        BadSampleError: nothing is left to learn from, or pictures and placeholders do not match.
    """
    turns = list(speeches(conversation, name))
    asked = [i for i, (speaker, _) in enumerate(turns) if speaker == "human"]
    for i in _marked(turns, asked, len(pictures), name):
        turns[i] = ("human", turns[i][1].replace(PLACEHOLDER, "").strip())
    # The picture belongs to the conversation, so it stays when the first question has no answer.
    pairs = [
        (question, answer.strip())
        for (before, question), (after, answer) in pairwise(turns)
        if (before, after) == ("human", "gpt") and answer.strip()
    ]
    if not pairs:
        raise BadSampleError(f"{name}: no human turn with an answer")
    return Record(id=name, turns=tuple(pairs), images=tuple(pictures))


def speeches(conversation: Any, name: str) -> Iterator[tuple[str, str]]:
    """(speaker, text) of every turn; the speaker is human, gpt or whatever else the file says."""
    if not isinstance(conversation, list):
        raise BadSampleError(f"{name}: conversations is {conversation!r:.60}; expected a list of turns")
    for number, turn in enumerate(conversation, 1):
        if not isinstance(turn, dict):
            raise BadSampleError(f"{name}: turn {number} is {turn!r:.60}; expected an object with from and value")
        speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if isinstance(text, list):  # the parts of a chat message
            text = "\n".join(PLACEHOLDER if _is_picture(part) else _text_of(part, number, name) for part in text)
        if text is not None and not isinstance(text, str):
            raise BadSampleError(f"{name}: turn {number} says {text!r:.60}; expected text")
        yield _SPEAKERS.get(str(speaker), str(speaker)), text or ""


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _text_of(part: Any, number: int, name: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise BadSampleError(f"{name}: turn {number} has a part {part!r:.60}; expected text or an image")
    return text


def _marked(turns: list[tuple[str, str]], asked: list[int], pictures: int, name: str) -> list[int]:
    """The human turns in which `<image>` is a placeholder: the first, or, if only then their number is right, all.

    In any other it is text: conversations without a picture also talk about HTML.
    """
    first = turns[asked[0]][1].count(PLACEHOLDER) if asked else 0
    if first == pictures:
        return asked[:1]
    total = sum(turns[i][1].count(PLACEHOLDER) for i in asked)
    if pictures and total == pictures:
        return asked
    elsewhere = f" and {total - first} in later ones" if total > first else ""
    raise BadSampleError(f"{name}: {first} {PLACEHOLDER} in the first human turn{elsewhere}, but {pictures} image(s)")


def locate(path: Path) -> Path:
    """The file itself, or the one of that name with another suffix: OCR-VQA's GIFs are JPGs in LLaVA's file."""
    # Path.exists raises on a name too long and in a folder that may not be read.
    if os.path.exists(path):
        return path
    return next((other for suffix in SUFFIXES if os.path.exists(other := path.with_suffix(suffix))), path)
