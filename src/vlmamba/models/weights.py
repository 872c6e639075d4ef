"""Weights from elsewhere: original mamba_ssm and transformers checkpoints, and a VL-Mamba composed from parts."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, MambaConfig

from vlmamba.models.config import VLMambaConfig
from vlmamba.models.loading import check_sizes, refuse_misfits
from vlmamba.models.mamba import VLMambaForCausalLM
from vlmamba.models.names import to_runtime
from vlmamba.models.template import PLACEHOLDER
from vlmamba.models.vision import VisionTower, build_vision_tower

if TYPE_CHECKING:
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

# The converted state-spaces models on the Hub do not say that their last three rows are padding.
_NEOX_TOKENS, _NEOX_ROWS = 50277, 50280
_VISION_KINDS = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def original_config(config: MambaConfig, num_tokens: int | None = None) -> dict[str, Any]:
    """The config.json that mamba_ssm reads for this language model."""
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": num_tokens or config.vocab_size,
        "pad_vocab_size_multiple": 8 if num_tokens else 1,
        "ssm_cfg": {
            "d_state": config.state_size,
            "d_conv": config.conv_kernel,
            "expand": config.expand,
            "dt_rank": config.time_step_rank,
        },
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "tie_embeddings": config.tie_word_embeddings,
    }


def language_config(raw: Mapping[str, Any], where: str) -> tuple[MambaConfig, int | None]:
    """A `MambaConfig` from a config.json of either kind, and the number of tokens if the file tells it.

    Raises:
        ValueError: for anything that is not a Mamba-1 with RMS norm.
    """
    check_sizes(raw, where)
    if raw.get("model_type") == "mamba":
        config = MambaConfig(**{k: v for k, v in raw.items() if k != "model_type"})
        return config, _NEOX_TOKENS if config.vocab_size == _NEOX_ROWS else None
    if "model_type" in raw or "d_model" not in raw:
        raise ValueError(f"{where}: expected the config.json of a Mamba-1, got model_type {raw.get('model_type')!r}")
    ssm = dict(raw.get("ssm_cfg") or {})
    if ssm.pop("layer", "Mamba1") != "Mamba1" or raw.get("attn_layer_idx") or raw.get("d_intermediate"):
        raise ValueError(f"{where}: only Mamba-1 without attention or MLP layers can be read, got {dict(raw)}")
    if not raw.get("rms_norm", True):
        raise ValueError(f"{where}: rms_norm is false; only RMS-norm models can be read")
    names = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank"}
    unknown = set(ssm) - set(names)
    if unknown:
        raise ValueError(f"{where}: unknown ssm_cfg keys {sorted(unknown)}; known are {sorted(names)}")
    sizes = {names[key]: value for key, value in ssm.items()}
    check_sizes(sizes, where)
    tokens = raw["vocab_size"]
    multiple = raw.get("pad_vocab_size_multiple", 8)
    config = MambaConfig(
        hidden_size=raw["d_model"],
        num_hidden_layers=raw["n_layer"],
        vocab_size=-(-tokens // multiple) * multiple,
        residual_in_fp32=raw.get("residual_in_fp32", True),
        tie_word_embeddings=raw.get("tie_embeddings", True),
        **sizes,
    )
    return config, tokens


def fetch(source: str | Path) -> Path:
    """The local folder of a checkpoint: `source` itself, or a download of the Hub repository of that name."""
    folder, text = Path(source), str(source)
    if text and folder.is_dir():
        return folder
    if not is_hub_id(text):
        raise ValueError(f"{text!r} is neither a folder here nor a Hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "*.safetensors", "pytorch_model*.bin"]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{text!r} is not a folder here and could not be downloaded from the Hub "
            f"({type(error).__name__}); check the spelling and the network"
        ) from error


def is_hub_id(text: str) -> bool:
    """Whether it may be one, as it has the form owner/name."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~"))


def fetch_whole(source: str | Path) -> Path:
    """The local folder of a VL-Mamba: as `fetch`, and of a training run's folder the model in it.

    Raises:
        ValueError: it is none.
    """
    folder = fetch(source)
    if (folder / "model/config.json").is_file() and not (folder / "config.json").is_file():
        folder = folder / "model"
    kind = read_config(folder).get("model_type")
    if kind != "vlmamba":
        raise ValueError(
            f"{source} is not a VL-Mamba: its config.json has model_type {kind!r}. "
            "A VL-Mamba of pre-trained parts is made by VLMambaForConditionalGeneration.from_parts"
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint folder."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json, so it is not a checkpoint")
    return _read_json(folder / "config.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a table of keys")
    return content


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder; safetensors preferred, pickles only as plain tensors (no code)."""
    found = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder} holds no weights; expected one of {', '.join(_FILES)}")
    if found.suffix == ".json":
        places = _read_json(found).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{found} holds no weight_map, which says where each tensor is")
        shards = sorted({str(shard) for shard in places.values()})
        missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{found} names shards that are not there: {missing}")
        paths = [folder / name for name in shards]
    else:
        paths = [found]
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors.update(_read_file(path))
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or incomplete: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{path} was refused: it is damaged, or holds more than plain tensors (code, perhaps). "
            "Convert it to safetensors where you trust it"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path} is not a table of tensors")
    return content


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies `tensors` into `model`; tied copies may be absent, everything else must match.

    Raises:
        ValueError: names every missing, surplus and mis-shaped tensor.
    """
    own = model.state_dict()
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    tied = set(getattr(model, "_tied_weights_keys", None) or {}) if is_tied else set()
    refuse_misfits(
        where,
        [f"{name} {tuple(own[name].shape)}" for name in own if name not in tensors and name not in tied],
        [f"{name} {tuple(tensors[name].shape)}" for name in tensors if name not in own],
        [
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
    )
    model.load_state_dict(dict(tensors), strict=False, assign=True)


def load_language(source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[VLMambaForCausalLM, int | None]:
    """A Mamba language model from a folder or Hub id, original or transformers' names; and its number of tokens, where
    its files tell.

    Raises:
        ValueError: not a Mamba-1 checkpoint, or a tensor missing, surplus or mis-shaped.
    """
    folder = fetch(source)
    config, tokens = language_config(read_config(folder), str(source))
    tensors = {to_runtime(name): tensor for name, tensor in read_tensors(folder).items()}
    tensors = {name: t.to(torch.float32 if ".ssm." in name else dtype) for name, t in tensors.items()}
    with torch.device("meta"):  # nothing is drawn at random only to be overwritten
        model = VLMambaForCausalLM(config)
    load_strictly(model, tensors, str(source))
    model.tie_weights()
    return model, tokens or count_tokens(folder)


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Token to id of the tokenizer beside a checkpoint; empty without one."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {}
    content = _read_json(path)
    try:
        return content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a tokenizer of the tokenizers library: no {error} in it") from error


def count_tokens(folder: Path) -> int | None:
    """Rows of the embedding that stand for text; None without a tokenizer."""
    ids = [number for token, number in read_vocabulary(folder).items() if token != PLACEHOLDER]
    return max(ids) + 1 if ids else None


def read_vision_config(folder: Path) -> Any:
    """The config of the vision half of a CLIP or SigLIP checkpoint.

    Raises:
        ValueError: another kind of model (its own code, if it brings any, does not run), or absurd sizes.
    """
    raw = read_config(folder)
    kind = raw.get("model_type")
    if kind not in _VISION_KINDS:
        raise ValueError(f"{folder} has model_type {kind!r}; a vision encoder is one of {', '.join(_VISION_KINDS)}")
    check_sizes(raw, str(folder))
    check_sizes(raw.get("vision_config") or {}, f"{folder}, vision_config")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    # Where it was read from, and as what, is nothing for the config of a model that it becomes a part of.
    config.name_or_path, config.architectures = "", None
    return config


def load_vision(source: str | Path, layer: int = -2, cls: bool = False) -> VisionTower:
    """A vision tower with the weights of a CLIP or SigLIP checkpoint (folder or Hub id).

    Raises:
        ValueError: neither CLIP nor SigLIP, or a tensor missing, surplus or mis-shaped.
    """
    folder = fetch(source)
    tower = build_vision_tower(read_vision_config(folder), layer, cls)
    picked, surplus = tower.select_weights({name: t.float() for name, t in read_tensors(folder).items()})
    if surplus:
        raise ValueError(f"{source} holds tensors that belong to neither CLIP nor SigLIP: {', '.join(surplus[:8])}")
    load_strictly(tower.model, picked, str(source))
    return tower


def compose(
    vision: str | Path,
    language: str | Path,
    *,
    connector: str = "vss-l2",
    scan: str = "bsm",
    scan_weights: str = "shared",
    vision_layer: int = -2,
    vision_cls: bool = False,
    image_token_id: int | None = None,
    num_text_tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> VLMambaForConditionalGeneration:
    """A VL-Mamba of a pre-trained vision encoder, a pre-trained Mamba and a randomly initialised connector.

    Args:
        vision, language: a folder or a Hub id each.
        image_token_id: the placeholder's id; default: what the tokenizer beside the language model says, else the
            first id above its tokens. It needs no row in the embedding.
        num_text_tokens: tokens that may be generated; default: what the language model's files tell, else all rows.
        dtype: of the whole model (A_log, D and dt bias stay float32).
    """
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

    language_model, tokens = load_language(language, dtype)
    tower = load_vision(vision, vision_layer, vision_cls)
    if image_token_id is None:
        image_token_id = read_vocabulary(fetch(language)).get(PLACEHOLDER)
    tokens = num_text_tokens or tokens or language_model.config.vocab_size
    config = VLMambaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        connector=connector,
        scan=scan,
        scan_weights=scan_weights,
        vision_layer=vision_layer,
        vision_cls=vision_cls,
        image_token_id=tokens if image_token_id is None else image_token_id,
        num_text_tokens=tokens,
    )
    return VLMambaForConditionalGeneration(config, tower, language_model).to(dtype)
