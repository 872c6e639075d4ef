"""A recipe's model without its weights: on the meta device, from configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPVisionConfig, MambaConfig, SiglipVisionConfig

import vlmamba
from vlmamba.models.config import VLMambaConfig
from vlmamba.models.mamba import VLMambaForCausalLM
from vlmamba.models.vision import build_vision_tower
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.models.weights import fetch_whole, is_hub_id, language_config, read_config
from vlmamba.training.build import NANO, STAGE, Model, fresh_language_config, fresh_vision_config, read_tokenizer
from vlmamba.training.config import ConfigError, ModelConfig, RunConfig
from vlmamba.training.contrastive import ContrastivePairs
from vlmamba.training.patches import PatchReader


def _mamba(width: int, layers: int) -> MambaConfig:
    return MambaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=50280, state_size=16, expand=2)


KNOWN: dict[str, Any] = {
    "state-spaces/mamba-130m": _mamba(768, 24),
    "state-spaces/mamba-370m": _mamba(1024, 48),
    "state-spaces/mamba-790m": _mamba(1536, 48),
    "state-spaces/mamba-1.4b": _mamba(2048, 48),
    "state-spaces/mamba-2.8b": _mamba(2560, 64),
    "state-spaces/mamba-2.8b-slimpj": _mamba(2560, 64),
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    ),
    "google/siglip-so400m-patch14-384": SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14,
    ),
}  # fmt: skip
"""The sizes of the paper's parts, so that a plan needs no network."""

_UNLEARNED = 2048
"""Entries assumed of a tokenizer that an earlier stage still has to learn."""


def outline(config: ModelConfig, earlier: Mapping[str, RunConfig] | None = None) -> Model:
    """The model of a recipe on the meta device.

    Args:
        earlier: recipes of a pipeline's stages, which `stage:NAME` refers to.

    Raises:
        ConfigError: a part of which neither a folder, the Hub nor an earlier stage tells the sizes.
    """
    if config.path is None and config.language is None:
        vision = _vision(config.vision, earlier or {})
        with torch.device("meta"):
            tower = build_vision_tower(vision, config.vision_layer, config.vision_cls)
            if config.contrastive is not None:
                return ContrastivePairs(tower, _entries(config), config.contrastive)
            return PatchReader(tower)
    found = _whole(config, earlier or {})
    with torch.device("meta"):
        if isinstance(found, VLMambaConfig):
            return VLMambaForConditionalGeneration(found)
        return VLMambaForCausalLM(found)


def _whole(config: ModelConfig, earlier: Mapping[str, RunConfig]) -> VLMambaConfig | MambaConfig:
    if config.path is not None:
        stage = _stage(config.path, earlier)
        return _whole(stage.model, earlier) if stage else _read_whole(config.path)
    language = _language(config, earlier)
    if config.vision is None:
        return language
    return VLMambaConfig(
        vision_config=_vision(config.vision, earlier),
        text_config=language,
        image_token_id=language.vocab_size - 1,
        **config.between(),
    )


def _stage(source: Any, earlier: Mapping[str, RunConfig]) -> RunConfig | None:
    if not isinstance(source, str) or not source.startswith(STAGE):
        return None
    name = source.removeprefix(STAGE)
    if name not in earlier:
        raise ConfigError(f"model: {source} names no stage before this one; run the pipeline, or name a folder")
    return earlier[name]


def _read_whole(source: str) -> VLMambaConfig:
    here = Path(source).is_dir() or not is_hub_id(source)  # from the Hub: the configuration, not the weights
    try:
        folder = vlmamba.nano() if source == NANO else fetch_whole(source) if here else source
        found = VLMambaConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.path: {source} holds no VL-Mamba ({' '.join(str(error).split())[:200]})") from None
    assert isinstance(found, VLMambaConfig)
    return found


def _language(config: ModelConfig, earlier: Mapping[str, RunConfig]) -> MambaConfig:
    source = config.language
    stage = _stage(source, earlier)
    if stage is not None:
        whole = _whole(stage.model, earlier)
        return whole.text_config if isinstance(whole, VLMambaConfig) else whole
    if isinstance(source, str):
        return KNOWN.get(source) or _read_language(source)
    return fresh_language_config(source or {}, _entries(config))


def _read_language(source: str) -> MambaConfig:
    if Path(source).is_dir():
        raw = read_config(Path(source))
        if raw.get("model_type") == "vlmamba":
            return _read_whole(source).text_config
        return language_config(raw, source)[0]
    return _from_hub(source, "language")


def _vision(source: Any, earlier: Mapping[str, RunConfig]) -> Any:
    stage = _stage(source, earlier)
    if stage is not None:
        if stage.model.path is None and stage.model.language is None:
            return _vision(stage.model.vision, earlier)
        whole = _whole(stage.model, earlier)
        assert isinstance(whole, VLMambaConfig)
        return whole.vision_config
    if not isinstance(source, str):
        return fresh_vision_config(source or {})
    if source in KNOWN:
        return KNOWN[source]
    if Path(source).is_dir() and read_config(Path(source)).get("model_type") == "vlmamba":
        return _read_whole(source).vision_config
    found = _from_hub(source, "vision")
    return getattr(found, "vision_config", found)


def _from_hub(source: str, part: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"model.{part}: the sizes of {source} are not known here ({reason})") from None


def _entries(config: ModelConfig) -> int:
    return _UNLEARNED if (config.tokenizer or "").startswith(STAGE) else len(read_tokenizer(config))
