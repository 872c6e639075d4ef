"""Configuration of a VL-Mamba; travels with the weights as config.json."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, MambaConfig, PreTrainedConfig, SiglipVisionConfig

from vlmamba.models.loading import WIDEST, check_sizes

CONNECTORS = ("mlp", "vss-mlp", "vss-l2")
SCANS = {
    "bsm": ("row", "row-reverse"),
    "csm": ("row", "row-reverse", "column", "column-reverse"),
    "forward": ("row",),
}
SCAN_WEIGHTS = ("shared", "per-order")

# Keys that transformers itself writes to or reads from a config.json without declaring a field for them.
_TRANSFORMERS_KEYS = frozenset(
    {"torch_dtype", "name_or_path", "_name_or_path", "_commit_hash", "num_labels", "transformers_version", "auto_map"}
    | {"output_attentions", "quantization_config", "per_layer_config", "model_type"}
    | {"attn_implementation", "_attn_implementation_internal"}
    | {"experts_implementation", "_experts_implementation_internal"}
)


@strict
class VLMambaConfig(PreTrainedConfig):
    """What a VL-Mamba is made of (arXiv 2403.13600, section 3).

    Args:
        vision_config: of a CLIP or SigLIP vision model (a transformers config or its dict).
        text_config: of the Mamba language model (transformers' `MambaConfig` or its dict).
        connector: "mlp", "vss-mlp" or "vss-l2" (the paper's final model).
        scan: orders of the 2-D scan: "bsm" (row-major, both ways; the final model), "csm" (column-major as well), or
            "forward" (row-major only).
        scan_weights: "shared": one Mamba layer for all orders; "per-order": convolution, x_proj, dt_proj, A, D and dt
            bias once per order, as VMamba has it.
        connector_width: of the hidden layer of the MLP in "mlp" and "vss-mlp"; None: the language model's width.
        vision_layer: index into the vision model's hidden states; -2 is the output of the second-to-last block.
        vision_cls: keep the class token before the patches (CLIP only).
        image_token_id: id of the placeholder that stands for one patch.
        num_text_tokens: entries of the tokenizer that may be generated; the rows of the embedding above them are
            padding (or the placeholder), whose logits are masked. None: all rows.
    """

    model_type = "vlmamba"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    connector: str = "vss-l2"
    scan: str = "bsm"
    scan_weights: str = "shared"
    connector_width: int | None = None
    vision_layer: int = -2
    vision_cls: bool = False
    image_token_id: int = 50277
    num_text_tokens: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unknown(kwargs, type(self))
        self.vision_config = _sub_config(self.vision_config, SiglipVisionConfig, "vision_config")
        self.text_config = _sub_config(self.text_config, MambaConfig, "text_config")
        self.vision_config = getattr(self.vision_config, "vision_config", self.vision_config)
        _expect("connector", self.connector, CONNECTORS)
        _expect("scan", self.scan, tuple(SCANS))
        _expect("scan_weights", self.scan_weights, SCAN_WEIGHTS)
        width = self.connector_width
        if width is not None and (self.connector == "vss-l2" or not 1 <= width <= WIDEST):
            raise ValueError(
                f"connector_width={width}: expected a number from 1 to {WIDEST}, for connector mlp or vss-mlp "
                f"(this is {self.connector})"
            )
        if not isinstance(self.text_config, MambaConfig):
            raise ValueError(f"text_config must be a MambaConfig (model_type 'mamba'), got {type(self.text_config)}")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)

    @property
    def orders(self) -> tuple[str, ...]:
        """Names of the scan's orders, as `vlmamba.ops.scan_2d` takes them."""
        return SCANS[self.scan]


def _sub_config(value: Any, default: Any, name: str) -> PreTrainedConfig:
    if value is None:
        return default()
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r:.80}; expected a configuration")
    options = dict(value)
    check_sizes(options, name)
    model_type = options.pop("model_type", default.model_type)
    try:
        return AutoConfig.for_model(model_type, **options)
    except (ValueError, StrictDataclassError) as error:
        told = str(error).partition(". Should contain one of ")[0]  # of all model types that transformers knows
        raise ValueError(f"{name}: {told}") from error


def _expect(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")


def _refuse_unknown(kwargs: dict[str, Any], config: type) -> None:
    from transformers import GenerationConfig

    known = _TRANSFORMERS_KEYS | set(GenerationConfig._get_default_generation_params())
    for key in kwargs:
        if key not in known:
            fields = [f for f in config.__dataclass_fields__ if not f.startswith("_")]  # type: ignore[attr-defined]
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown configuration key {key!r} for a VL-Mamba{hint}")
