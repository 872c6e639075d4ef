"""Training: recipes to models, restartable at any step."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "RunConfig": "config",
    "ConfigError": "config",
    "load_config": "config",
    "run": "launch",
    "run_pipeline": "stages",
    "Interrupted": "trainer",
    "INTERRUPTED": "trainer",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    # Names load on first use: reading a recipe needs no torch.
    if name not in _HOME:
        raise AttributeError(f"module 'vlmamba.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"vlmamba.training.{_HOME[name]}"), name)
