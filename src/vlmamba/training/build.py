"""From the `model` section of a recipe to a model and its processor: existing parts, fresh parts, or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, MambaConfig, PreTrainedTokenizerFast, SiglipVisionConfig
from transformers.utils import logging as transformers_logging

import vlmamba
from vlmamba.models.config import VLMambaConfig
from vlmamba.models.mamba import VLMambaForCausalLM
from vlmamba.models.preparation import build_image_processor, load_image_processor, load_tokenizer
from vlmamba.models.processor import VLMambaProcessor
from vlmamba.models.vision import VisionTower, build_vision_tower
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.models.weights import fetch_whole, load_language, load_vision
from vlmamba.training.config import ConfigError, ModelConfig
from vlmamba.training.contrastive import ContrastivePairs
from vlmamba.training.patches import PatchReader

STAGE = "stage:"
MODEL_FOLDER = "model"
"""Where in its run folder a finished run keeps its model."""

Model = VLMambaForConditionalGeneration | VLMambaForCausalLM | PatchReader | ContrastivePairs


NANO = "nano"
"""As a model's path: the one that is shipped with the package."""


def resolve(config: ModelConfig, pipeline: Path) -> ModelConfig:
    """`stage:NAME` replaced by that stage's finished model, in the folder of a pipeline's runs."""

    def found(value: Any) -> Any:
        if not isinstance(value, str) or not value.startswith(STAGE):
            return value
        folder = pipeline / value.removeprefix(STAGE)
        folder = folder if (folder / "tokenizer.json").is_file() else folder / MODEL_FOLDER
        if not folder.is_dir():
            raise ConfigError(f"model: {value} is not there yet ({folder}); run that stage first")
        return str(folder)

    return replace(
        config,
        path=found(config.path),
        vision=found(config.vision),
        language=found(config.language),
        tokenizer=found(config.tokenizer),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No bars of transformers' own for loading and saving, in between our lines."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def build(config: ModelConfig, image_mode: str) -> tuple[Model, VLMambaProcessor]:
    """The model in float32 on the CPU, and the processor that prepares its data.

    Raises:
        ValueError: a part that cannot be found, or parts that do not fit.
    """
    for part in (config.path, config.vision, config.language, config.tokenizer):
        if isinstance(part, str) and part.startswith(STAGE):
            raise ConfigError(f"model: {part} is the result of another stage; run the pipeline, or name a folder")
    if config.path is not None:
        folder = vlmamba.nano() if config.path == NANO else fetch_whole(config.path)
        processor = VLMambaProcessor.from_pretrained(folder)
        processor.image_mode = image_mode
        return VLMambaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), processor
    tokenizer = read_tokenizer(config)
    if config.language is None:
        tower, image_processor = _vision(config)
        processor = VLMambaProcessor(image_processor, tokenizer, tower.patch_size, image_mode=image_mode)
        if config.contrastive is not None:
            return ContrastivePairs(tower, len(processor.tokenizer), config.contrastive), processor
        return PatchReader(tower), processor
    language = _language(config.language, tokenizer)
    if config.vision is None:
        return language, _text_processor(tokenizer)
    tower, image_processor = _vision(config)
    processor = VLMambaProcessor(
        image_processor, tokenizer, tower.patch_size, config.vision_cls, image_mode, image_place=config.image_place
    )
    model = VLMambaForConditionalGeneration(
        VLMambaConfig(
            vision_config=tower.config,
            text_config=language.config,
            image_token_id=processor.image_token_id,
            num_text_tokens=_num_text_tokens(tokenizer, processor.image_token_id),
            **config.between(),
        ),
        tower,
        language,
    )
    return model, processor


def save(model: Model, processor: VLMambaProcessor, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Model and processor in one folder, as `from_pretrained` loads them; `state` holds the weights, by name. Of an
    encoder trained alone: the encoder as transformers keeps it, without the heads."""
    if isinstance(model, PatchReader | ContrastivePairs):
        encoder, prefix = model.vision_tower.model, "vision_tower.model."
        kept = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        encoder.save_pretrained(folder, state_dict=kept)
        processor.image_processor.save_pretrained(folder)
        return
    model.save_pretrained(folder, state_dict=state)
    if isinstance(model, VLMambaForConditionalGeneration):
        processor.save_pretrained(folder)
    else:
        processor.tokenizer.save_pretrained(folder)


def _num_text_tokens(tokenizer: PreTrainedTokenizerFast, image_token_id: int) -> int:
    """Entries that may be generated: all below the placeholder if it is the last, else all."""
    return image_token_id if image_token_id == len(tokenizer) - 1 else len(tokenizer)


def read_tokenizer(config: ModelConfig) -> PreTrainedTokenizerFast:
    """The one named, or the language model's own."""
    named = config.tokenizer or (config.language if isinstance(config.language, str) else None)
    if named is None:
        raise ConfigError("model.tokenizer: a language model from scratch needs one; name a folder or a Hub id")
    if config.tokenizer is None and not _is_vlmamba(named):
        return load_tokenizer(named)
    try:
        return AutoTokenizer.from_pretrained(named, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.tokenizer: {named} holds no tokenizer ({error})") from None


def _language(source: str | Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerFast) -> VLMambaForCausalLM:
    if isinstance(source, str):
        if _is_vlmamba(source):
            whole = VLMambaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
            return whole.language_model
        return load_language(source)[0]
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return VLMambaForCausalLM(fresh_language_config(ids | dict(source or {}), len(tokenizer)))


def _vision(config: ModelConfig) -> tuple[VisionTower, Any]:
    """The tower and its image processor."""
    source, layer, cls = config.vision, config.vision_layer, config.vision_cls
    if isinstance(source, str):
        if _is_vlmamba(source):
            whole = VLMambaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
            tower, of = whole.vision_tower, whole.config
            if (tower.layer, tower.cls) != (layer % (tower.config.num_hidden_layers + 1), cls):
                raise ConfigError(
                    f"model.vision: {source} gives out layer {of.vision_layer} with vision_cls {of.vision_cls}, this "
                    f"recipe asks for {layer} and {cls}; write model.vision_layer: {of.vision_layer} and "
                    f"model.vision_cls: {str(of.vision_cls).lower()}"
                )
            return tower, VLMambaProcessor.from_pretrained(source).image_processor
        tower = load_vision(source, layer, cls)
        return tower, load_image_processor(source, tower.config)
    fresh = fresh_vision_config(source or {})
    return build_vision_tower(fresh, layer, cls), build_image_processor(fresh)


def fresh_language_config(fields: Mapping[str, Any], entries: int) -> MambaConfig:
    """Of a language model from scratch over a tokenizer of so many entries: rows up to a multiple of 64, so that the
    head's product runs on whole tiles."""
    return _configure(MambaConfig, {"vocab_size": -(-entries // 64) * 64} | dict(fields), "model.language")


def fresh_vision_config(fields: Mapping[str, Any]) -> SiglipVisionConfig:
    return _configure(SiglipVisionConfig, fields, "model.vision")


def _configure(kind: Any, fields: Mapping[str, Any], where: str) -> Any:
    """A transformers config; a field that it does not declare is an error, not an attribute."""
    known = vars(kind()).keys()
    for field in fields:
        if field not in known:
            raise ConfigError(f"{where}.{field}: {kind.__name__} has no such field")
    return kind(**fields)


def _text_processor(tokenizer: PreTrainedTokenizerFast) -> VLMambaProcessor:
    """For a language model alone: its images are never asked for."""
    return VLMambaProcessor(build_image_processor(SiglipVisionConfig()), tokenizer)


def _is_vlmamba(source: str) -> bool:
    return (Path(source) / "processor_config.json").is_file()
