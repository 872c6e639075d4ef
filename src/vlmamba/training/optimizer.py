"""Which parameters are trained, at what rate: one AdamW group per part and kind of parameter, and the schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from vlmamba.training.config import PARTS, OptimConfig, PartConfig, StageConfig

MODULES = {"vision": "vision_tower", "connector": "connector", "language": "language_model"}
"""Where each part sits in VLMambaForConditionalGeneration."""

_SSM = re.compile(r"(^|\.)(A_log|D|dt_bias)$")


def part_of(name: str) -> str:
    """The part that a parameter belongs to; a language model trained alone has only that one. The heads of an encoder
    trained alone learn with it."""
    if name.startswith("heads."):
        return "vision"
    found = [part for part, module in MODULES.items() if re.search(rf"(^|\.){module}\.", name)]
    return found[0] if found else "language"


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: never to A_log, D and the dt bias, nor to norms and biases."""
    return parameter.ndim >= 2 and not _SSM.search(name) and not name.endswith("bias")


def freeze(model: nn.Module, stage: StageConfig, adapted: Collection[str] = ()) -> None:
    """Leaves gradients on in the parts that have a learning rate, and nowhere else; of the parts `adapted` by LoRA only
    in the adapters.

    The small SSM parameters must be float32 here: in bf16 they would not move.
    """
    for name, parameter in model.named_parameters():
        part = part_of(name)
        config: PartConfig = getattr(stage, part)
        parameter.requires_grad_(config.lr > 0 and (part not in adapted or ".lora_" in name))
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; trained parameters must be stored in float32")


def parameter_groups(model: nn.Module, stage: StageConfig) -> list[dict[str, Any]]:
    """AdamW groups of the trained parameters, each with its peak rate as `peak_lr`.

    Raises:
        ValueError: the stage trains a part that this model does not have.
    """
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, decayed = part_of(name), is_decayed(name, parameter)
        config: PartConfig = getattr(stage, part)
        group = groups.setdefault(
            (part, decayed),
            {
                "name": part + ("" if decayed else " (no decay)"),
                "params": [],
                "peak_lr": config.lr,
                "lr": config.lr,
                "weight_decay": config.weight_decay if decayed else 0.0,
            },
        )
        group["params"].append(parameter)
    present = {part for part, _ in groups}
    missing = [part for part in PARTS if getattr(stage, part).lr > 0 and part not in present]
    if missing:
        raise ValueError(f"stage.{missing[0]}: has a learning rate, but the model has no {missing[0]} part")
    return list(groups.values())


def make_optimizer(groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with float32 moments, fused: a loop over the parameters in Python costs more than a small model's step."""
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=device.type in ("cuda", "cpu") or None
    )


def rate_at(progress: float, optim: OptimConfig) -> float:
    """Factor on the peak rate at a share of the run: linear warm-up, then a cosine down to `final_lr`."""
    if progress < optim.warmup:
        return progress / optim.warmup
    along = min(1.0, (progress - optim.warmup) / (1.0 - optim.warmup))
    return optim.final_lr + (1.0 - optim.final_lr) * 0.5 * (1.0 + math.cos(math.pi * along))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        rate = group["peak_lr"] * factor
        if isinstance(group["lr"], Tensor):  # where a captured step reads it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
