"""VL-Mamba: vision-language models whose language model is a Mamba.

Importing the package costs nothing: names load on first use. After `import vlmamba`, transformers' Auto classes
(`AutoConfig`, `AutoProcessor`, `AutoModelForImageTextToText`) know VL-Mamba checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmamba import models
from vlmamba.models.registration import install as _register_with_transformers

__version__ = "0.1.0"

__all__ = ["__version__", "nano", *models.__all__]


def nano() -> str:
    """The folder of the model that ships with the package, for `from_pretrained`."""
    return str(Path(__file__).parent / "assets" / "nano")


def __getattr__(name: str) -> Any:
    if name not in models.__all__:
        raise AttributeError(f"module 'vlmamba' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(models, name)


def __dir__() -> list[str]:
    return sorted(__all__)


_register_with_transformers("vlmamba.models")
