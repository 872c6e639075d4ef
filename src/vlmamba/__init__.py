"""VL-Mamba: vision-language models whose language model is a Mamba.

Importing the package costs nothing: names load on first use. The first use of a model name also registers
the transformers Auto classes (`AutoConfig`, `AutoProcessor`, `AutoModelForImageTextToText`).
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "VLMambaConfig": "vlmamba.models",
    "VLMambaForConditionalGeneration": "vlmamba.models",
    "VLMambaProcessor": "vlmamba.models",
    "MambaForCausalLM": "vlmamba.models",
    "MambaState": "vlmamba.models",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vlmamba' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
