"""Who else can be measured on this machine, and why the others cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from types import ModuleType

PEERS = {"mamba-ssm": "mamba_ssm", "causal-conv1d": "causal_conv1d", "transformers": "transformers"}


@functools.cache
def refusal(peer: str) -> str | None:
    """Why this peer cannot be imported; None if it can."""
    try:
        importlib.import_module(PEERS[peer])
    except Exception as error:  # a broken extension fails in many ways, each of them worth showing
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return None


def versions() -> dict[str, str]:
    """What every peer is here: its version, or why it is missing."""
    found = {}
    for peer, module in PEERS.items():
        why = refusal(peer)
        version = getattr(sys.modules.get(module), "__version__", "unknown version")
        found[peer] = version if why is None else f"missing ({why})"
    return found


@functools.cache
def plain_mamba() -> ModuleType:
    """transformers' modeling_mamba as it is without mamba-ssm and causal-conv1d, whether or not they are installed.

    It looks for them once, when it is imported: this imports it a second time, with both out of sight.
    """
    from transformers.models.mamba import modeling_mamba

    hidden = {name: sys.modules.get(name) for name in ("mamba_ssm", "causal_conv1d")}
    spec = importlib.util.spec_from_file_location(f"{modeling_mamba.__name__}_plain", modeling_mamba.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        sys.modules.update(dict.fromkeys(hidden, None))  # type: ignore[arg-type]
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        for name, before in hidden.items():
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before
    return module
