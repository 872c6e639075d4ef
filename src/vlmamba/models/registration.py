"""Makes transformers' Auto classes know VL-Mamba after `import vlmamba`, without importing transformers for it.

Registering at once would cost every `import vlmamba` (and `vlmamba --help`) the seconds that transformers and torch
take to load. So each registration waits until the module that holds the Auto class is imported, by whomever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def _register_config() -> None:
    from transformers import AutoConfig

    from vlmamba.models.config import VLMambaConfig

    AutoConfig.register(VLMambaConfig.model_type, VLMambaConfig, exist_ok=True)


def _register_model() -> None:
    from transformers import AutoModelForImageTextToText

    from vlmamba.models.config import VLMambaConfig
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

    AutoModelForImageTextToText.register(VLMambaConfig, VLMambaForConditionalGeneration, exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor

    from vlmamba.models.config import VLMambaConfig
    from vlmamba.models.processor import VLMambaProcessor

    AutoProcessor.register(VLMambaConfig, VLMambaProcessor, exist_ok=True)


_WAITING: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.processing_auto": _register_processor,
}


class _AfterImport(MetaPathFinder):
    """Runs the registration that waits for a module right after that module's body."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WAITING:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _WAITING[fullname]()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Registers with what is loaded already, and waits for the rest."""
    sys.meta_path.insert(0, _AfterImport())
    for module, register in _WAITING.items():
        if module in sys.modules:
            register()
