"""Records to examples: pictures to pixels, conversations and documents to token ids and labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlmamba.data.collate import Example, truncate
from vlmamba.data.records import BadSampleError, Record
from vlmamba.models.processor import VLMambaProcessor


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

    def __call__(self, record: Record) -> Example:
        """Raises `BadSampleError` where a picture cannot be read or nothing is left to learn."""
        try:
            if record.text is not None:
                encoded = self.processor.encode_text(record.text)
            else:
                encoded = self.processor.encode_turns(record.turns, len(record.images), self.template)
            pixels = tuple(self._pixels(image) for image in record.images)
        except ValueError as problem:
            raise BadSampleError(f"{record.id}: {problem}") from problem
        example = Example(record.id, np.asarray(encoded["input_ids"]), np.asarray(encoded["labels"]), pixels)
        return truncate(example, self.max_length, self.processor.image_token_id)

    def _pixels(self, image: Path | Image.Image) -> np.ndarray:
        """uint8 (3, H, W). A picture that has the encoder's size already (a rendered scene) needs no processing."""
        height, width = self.processor.image_size
        if isinstance(image, Image.Image) and image.size == (width, height) and image.mode == "RGB":
            return np.asarray(image).transpose(2, 0, 1)
        return self.processor.image_pixels(image, self.image_mode)
