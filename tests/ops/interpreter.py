"""Lets the Triton kernels run on this machine: on its GPU, or in Triton's interpreter. Import before any kernel module.

Triton 3.6's interpreter calls `int()` on one-element arrays, which numpy >= 2.4 refuses: `item()` takes its place.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

triton = pytest.importorskip("triton")

if DEVICE == "cpu":
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_index
    # A device function's call patches the language anew, though its kernel's call has done so: a third of the time.
    _call = interpreter.InterpretedFunction.__call__

    def _call_patched(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        ours = self.fn.__module__.startswith("vlmamba.")
        return self.rewrite()(*args, **kwargs) if ours else _call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call_patched
