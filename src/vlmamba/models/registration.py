"""Makes transformers' Auto classes know VL-Mamba after `import vlmamba`, without importing anything for it.

`AutoConfig.register` and its like want the classes, and so the seconds that transformers and torch take to load, on
every `import vlmamba` and `vlmamba --help`. transformers' own models are known to it by name instead, in tables,
and imported on first use. Ours take the same way: their names are added to the tables, now or as soon as the module
that holds a table has been imported, and `transformers.models.vlmamba` leads to `vlmamba.models`. `AutoModel`
gives the model that answers: there is none without a head.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_MODEL_TYPE, _CONFIG = "vlmamba", "VLMambaConfig"
_AUTO = "transformers.models.auto."

# Modules of transformers, our class for them, their tables of names, and the mappings that are built over those.
_TABLES: dict[str, tuple[str, dict[str, str | None]]] = {
    _AUTO + "configuration_auto": (_CONFIG, {"CONFIG_MAPPING_NAMES": None}),
    _AUTO + "modeling_auto": (
        "VLMambaForConditionalGeneration",
        {
            "MODEL_MAPPING_NAMES": "MODEL_MAPPING",
            "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        },
    ),
    _AUTO + "processing_auto": ("VLMambaProcessor", {"PROCESSOR_MAPPING_NAMES": "PROCESSOR_MAPPING"}),
}


def _add_name(module: ModuleType) -> None:
    name, tables = _TABLES[module.__name__]
    for table, mapping in tables.items():
        getattr(module, table)[_MODEL_TYPE] = name
        if mapping is not None:
            getattr(module, mapping)._reverse_config_mapping[_CONFIG] = _MODEL_TYPE


class _AfterImport(MetaPathFinder):
    """Adds our name to a table right after the body of the module that holds it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_add(module: ModuleType) -> None:
            execute(module)
            _add_name(module)

        spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


def install(models: str) -> None:
    """Registers the classes of the package named `models`."""
    sys.modules.setdefault(f"transformers.models.{_MODEL_TYPE}", sys.modules[models])
    sys.meta_path.insert(0, _AfterImport())
    for name in _TABLES:
        if name in sys.modules:
            _add_name(sys.modules[name])
