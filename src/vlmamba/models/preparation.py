"""The halves of a processor as pre-trained parts bring them: tokenizers and image processors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

# The tokenizer of state-spaces/mamba-*, whose repositories hold none.
GPT_NEOX = "EleutherAI/gpt-neox-20b"


def load_tokenizer(language: str | Path) -> Any:
    """The tokenizer in the folder or Hub repository of a language model; GPT-NeoX's where there is none."""
    from transformers import PreTrainedTokenizerFast

    from vlmamba.models.weights import fetch, language_config, read_config  # late: others here need no model

    folder = fetch(language)
    own = (folder / "tokenizer.json").is_file()
    if not own:
        warnings.warn(f"{language} holds no tokenizer.json; the tokenizer of {GPT_NEOX} is taken", stacklevel=2)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder if own else GPT_NEOX)
    except OSError as error:
        raise ValueError(
            f"{language} holds no tokenizer.json and that of {GPT_NEOX} could not be downloaded; "
            f"put a tokenizer.json into {folder}"
        ) from error
    except Exception as error:  # of damaged files the tokenizers library and its readers raise nearly anything
        raise ValueError(f"{folder / 'tokenizer.json'} is no tokenizer that can be read: {error!r}") from error
    rows = language_config(read_config(folder), str(language))[0].vocab_size
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer for {language} has {len(tokenizer)} entries, its embedding {rows} rows")
    return tokenizer


def build_image_processor(vision_config: Any) -> Any:
    """The image processor for a vision config: its kind's own mean, deviation and resampling, at its image size."""
    size = vision_config.image_size
    square = {"height": size, "width": size}
    if vision_config.model_type == "clip_vision_model":
        return image_processor_class("CLIP")(size={"shortest_edge": size}, crop_size=square)
    return image_processor_class("Siglip")(size=square)


def load_image_processor(path: str | Path, vision_config: Any) -> Any:
    """The image processor saved beside a vision encoder; where there is none, one for its config."""
    kind = "CLIP" if vision_config.model_type == "clip_vision_model" else "Siglip"
    try:
        return image_processor_class(kind).from_pretrained(path)
    except OSError:
        return build_image_processor(vision_config)


def image_processor_class(name: str) -> Any:
    # The Pil classes: those without the suffix want torchvision.
    if name.startswith("CLIP"):
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        return CLIPImageProcessorPil
    if name.startswith("Siglip"):
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        return SiglipImageProcessorPil
    raise ValueError(f"image_processor_type {name!r}: expected a CLIP or Siglip image processor")
