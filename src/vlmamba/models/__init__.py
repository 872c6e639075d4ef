"""The models; names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "VLMambaConfig": "config",
    "VLMambaForConditionalGeneration": "vlm",
    "VLMambaProcessor": "processor",
    "VLMambaForCausalLM": "mamba",
    "MambaState": "state",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vlmamba.models' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vlmamba.models.{_HOME[name]}"), name)
