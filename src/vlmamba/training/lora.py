"""Low-rank adapters (arXiv 2106.09685) by PEFT: put into chosen linear maps, trained, merged into plain weights, saved.

W stays frozen; what is learned is B A, of rank r, and the layer computes W x + (alpha / r) B A x.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from vlmamba.training.config import ConfigError, LoraConfig
from vlmamba.training.optimizer import MODULES, part_of

_BASE, _A, _B = ".base_layer.", ".lora_A.default.", ".lora_B.default."
_PEFT_PREFIX = "base_model.model."


def add_adapters(model: nn.Module, config: LoraConfig) -> list[str]:
    """Puts adapters into the model, in place; returns the names of the layers that got one.

    Raises:
        ConfigError: a target that no linear map of the chosen parts has for its name, or PEFT is not installed.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ConfigError("lora: needs PEFT: pip install 'vlmamba[lora]'") from None
    chosen = find_targets(model, config)
    # A holder of no known type: PEFT refuses out_proj for models of type "mamba", whose fused kernels would pass by
    # the adapter there. Ours calls every projection as a module.
    holder = nn.Module()
    holder.add_module("held", model)
    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # only ever divided by the rank
        lora_dropout=config.dropout,
        target_modules=[f"held.{name}" for name in chosen],
    )
    inject_adapter_in_model(settings, holder)
    return chosen


def find_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear maps in the chosen parts that a target names, by the end of their name."""
    linear = [
        name
        for name, module in model.named_modules()
        # The head shares its weight with the embeddings, which an adapter would not follow.
        if isinstance(module, nn.Linear) and not name.endswith("lm_head") and part_of(f"{name}.weight") in config.parts
    ]
    chosen: list[str] = []
    for target in config.targets:
        found = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ConfigError(
                f"lora.targets: {target!r} is no linear map of {', '.join(config.parts)}; those are {', '.join(known)}"
            )
        chosen += found
    return sorted(set(chosen))


def merged(state: dict[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The plain weights that compute what base and adapters compute together.

    Args:
        state: all parameters of a model with adapters, by name.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        if _BASE in name:
            layer, kind = name.split(_BASE)
            name = f"{layer}.{kind}"
            if kind == "weight":
                low, high = state[f"{layer}{_A}weight"], state[f"{layer}{_B}weight"]
                tensor = tensor + (config.alpha / config.rank) * (high.float() @ low.float()).to(tensor.dtype)
        plain[name] = tensor
    return plain


def save_adapters(
    state: dict[str, Tensor], trained: Iterable[str], config: LoraConfig, base: str | None, folder: Path
) -> None:
    """Adapters, and parts that were trained whole, as `peft.PeftModel.from_pretrained(model, folder)` reads them.

    Args:
        trained: names of the trained parameters in `state`.
        base: what the adapters were trained on.
    """
    trained = list(trained)
    whole = sorted({part_of(name) for name in trained if ".lora_" not in name})
    tensors = {_PEFT_PREFIX + name.replace(".default.", "."): state[name].contiguous() for name in trained}
    layers = sorted({name.split(".lora_")[0] for name in trained if ".lora_" in name})
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": layers,
        "modules_to_save": [MODULES[part] for part in whole] or None,
        "inference_mode": True,
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))
