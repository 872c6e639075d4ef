"""An encoder for 16-pixel images, and a dirty LLaVA file."""

from __future__ import annotations

from pathlib import Path

import dirt
import pytest
from transformers import SiglipVisionConfig

from vlmamba.data.encoding import Encoder
from vlmamba.models.preparation import build_image_processor
from vlmamba.models.processor import VLMambaProcessor


@pytest.fixture
def encoder(tokenizer) -> Encoder:
    images = build_image_processor(SiglipVisionConfig(image_size=16, patch_size=8))
    return Encoder(VLMambaProcessor(images, tokenizer, 8), "v1", "pad", 400)


@pytest.fixture
def dirty(tmp_path: Path) -> Path:
    """The folder of `dirt.write`."""
    folder = tmp_path / "dirty"
    dirt.write(folder)
    return folder
