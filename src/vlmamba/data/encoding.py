"""Records to examples: pictures to pixels, conversations and documents to token ids and labels, marks to classes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlmamba.data.collate import NO_LABEL, Example, truncate
from vlmamba.data.records import BadSampleError, Record, locate
from vlmamba.data.remembering import Remembering
from vlmamba.data.scenes.marks import patch_classes
from vlmamba.models.processor import VLMambaProcessor


class Size(NamedTuple):
    """How long a record is as an example.

    Attributes:
        length: tokens, images included, nothing cut.
        least: the smallest `max_length` with which something of it can be learned.
    """

    length: int
    least: int


@dataclass
class Encoder:
    """Tokenises and reads pictures through a processor.

    Args:
        template: "plain" (image, caption) or "v1" (system, USER / ASSISTANT turns).
        image_mode: "crop" or "pad".
        max_length: tokens; longer samples lose their end.
    """

    processor: VLMambaProcessor
    template: str
    image_mode: str
    max_length: int

    def __post_init__(self) -> None:
        self._tokenise = Remembering(self.processor.tokenizer)

    def __call__(self, record: Record) -> Example:
        """Raises `BadSampleError` where a picture cannot be read or nothing is left to learn."""
        ids, labels = self._tokens(record)
        # The text first: it is cheap, and no picture need be read for a sample that has no use.
        example = truncate(Example(record.id, ids, labels), self.max_length, self.processor.image_token_id)
        try:
            files = [locate(image) if isinstance(image, Path) else image for image in record.images]
            pixels = tuple(self.processor.image_pixels(image, self.image_mode) for image in files)
        except ValueError as problem:
            raise BadSampleError(f"{record.id}: {problem}") from problem
        return Example(record.id, example.input_ids, example.labels, pixels)

    def measure(self, record: Record) -> Size:
        """The size of the example that the record makes, without a look at its pictures.

        Raises:
            BadSampleError: the record can never be used.
        """
        ids, labels = self._tokens(record)
        learned = np.flatnonzero(labels[1:] != NO_LABEL)
        if not len(learned):
            raise BadSampleError(f"{record.id}: nothing to learn from")
        seen = np.flatnonzero(ids == self.processor.image_token_id)
        return Size(len(ids), max(int(learned[0]) + 2, int(seen[-1]) + 1 if len(seen) else 0))

    def fingerprint(self) -> str:
        """A hash of all that decides on lengths: tokenizer, template, tokens of an image. Not `max_length`."""
        backend = self.processor.tokenizer.backend_tokenizer.to_str()
        turns = (("What is\nthis?", "A cat"), ("Why?", "It purrs"))
        probe = self._tokens(Record("probe", turns[:1] if self.template == "plain" else turns), images=1)
        text = f"{backend}|{self.template}|{probe[0].tolist()}|{probe[1].tolist()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _tokens(self, record: Record, images: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        if record.marks is not None:
            return self._patches(record)
        try:
            if record.text is not None:
                encoded = self.processor.encode_text(record.text, self._tokenise)
            else:
                count = len(record.images) if images is None else images
                encoded = self.processor.encode_turns(record.turns, count, self.template, self._tokenise)
        except ValueError as problem:
            raise BadSampleError(f"{record.id}: {problem}") from problem
        return np.array(encoded["input_ids"], np.int64), np.array(encoded["labels"], np.int64)

    def _patches(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """The classes of all patches, field by field, where else the labels of tokens stand: after a first one that,
        as everywhere, nothing stands before. The ids say no more than that all is about the image."""
        (image,), processor = record.images, self.processor
        assert isinstance(image, Image.Image)
        assert record.marks is not None
        rows, columns = (edge // processor.patch_size for edge in processor.image_size)
        classes = patch_classes(record.marks, image.width, rows, columns)
        labels = np.concatenate(([NO_LABEL], classes.reshape(-1)))
        return np.full_like(labels, processor.image_token_id), labels
