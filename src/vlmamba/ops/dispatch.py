"""Which implementation of an op runs, and why.

The order of precedence: an explicit `implementation=` argument, `with use_implementation(name)`, the environment
variable `VLMAMBA_OPS`, then the device and dtype of the input:

    triton      CUDA (or ROCm) tensors, where triton can be imported
    cpu         float32, bfloat16 and float16 on the CPU, where llvmlite can generate code for this host
    reference   everything else: float64, Apple's mps, hosts without triton or llvmlite
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

OPS = ("selective_scan", "causal_conv1d", "state_update", "scan_2d")
IMPLEMENTATIONS = ("reference", "cpu", "triton")

_override: str | None = None


@contextmanager
def use_implementation(name: str) -> Iterator[None]:
    """Run every op inside the block through `name` ("reference", "cpu" or "triton"). One process-wide setting."""
    global _override
    _check_name(name, "use_implementation")
    before, _override = _override, name
    try:
        yield
    finally:
        _override = before


@torch.compiler.assume_constant_result  # so torch.compile takes the answer and does not trace the search for it
def choose(op: str, device: torch.device, dtype: torch.dtype, implementation: str | None = None) -> str:
    """The name of the implementation that `op` will use; ValueError if the one asked for cannot run here."""
    asked = implementation or _override or _from_environment()
    if asked is None:
        return _by_input(device.type, dtype)
    if asked == "triton" or asked == "cpu":
        refusal = _refusal(asked, device.type, dtype)
        if refusal is not None:
            raise ValueError(f"{op}: implementation {asked!r} cannot run on {device.type} {dtype}: {refusal}")
        return asked
    _check_name(asked, op)
    return asked


def explain(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """One line: which implementation `op` uses for tensors of this device and dtype, and the reason."""
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
    kind = torch.device(device).type
    asked = _override or _from_environment()
    if asked is not None:
        refusal = _refusal(asked, kind, dtype)
        origin = "use_implementation" if _override else "VLMAMBA_OPS"
        return f"{asked} (set by {origin})" if refusal is None else f"{asked} (set by {origin}), which fails: {refusal}"
    chosen = _by_input(kind, dtype)
    if chosen != "reference":
        return f"{chosen}: {_strength(chosen)}"
    wanted = "triton" if kind == "cuda" else "cpu"
    return f"reference (plain torch, slower): {_refusal(wanted, kind, dtype)}"


def module(op: str, name: str) -> ModuleType:
    """The implementation's module, imported on first use."""
    return _load(op, name)


def runs_directly(*tensors: torch.Tensor | None) -> bool:
    """Whether the implementation may be called without the torch.library op around it, which costs tens of
    microseconds: no gradient is wanted, nothing is being traced, and the tensors are plain and hold data."""
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if (grad and tensor.requires_grad) or type(tensor) not in _PLAIN or tensor.is_meta:
            return False
    return True


_PLAIN = (torch.Tensor, torch.nn.Parameter)


@functools.cache
def _load(op: str, name: str) -> ModuleType:
    return importlib.import_module(f"vlmamba.ops.{op}.{name}")


def _check_name(name: str, where: str) -> None:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{where}: unknown implementation {name!r}; expected one of {', '.join(IMPLEMENTATIONS)}")


def _from_environment() -> str | None:
    name = os.environ.get("VLMAMBA_OPS")
    if name:
        _check_name(name, "environment variable VLMAMBA_OPS")
    return name or None


def _by_input(kind: str, dtype: torch.dtype) -> str:
    wanted = "triton" if kind == "cuda" else "cpu"
    refusal = _refusal(wanted, kind, dtype)
    if refusal is None:
        return wanted
    if dtype != torch.float64 and kind in ("cuda", "cpu"):
        _warn_once(f"vlmamba runs its plain torch ops on {kind}, many times slower than the {wanted} form: {refusal}")
    return "reference"


def _refusal(name: str, kind: str, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot take tensors of this kind; None if it can."""
    if name == "reference":
        return None
    if dtype == torch.float64:
        return "float64 is computed by the reference alone"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no form for {dtype}"
    if name == "triton":
        return _triton_refusal(kind)
    return _native_refusal() if kind == "cpu" else f"it takes CPU tensors, got {kind}"


def _triton_refusal(kind: str) -> str | None:
    if not _triton_found():
        return "triton is not installed"
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"triton takes CUDA tensors, got {kind} (TRITON_INTERPRET=1 lets it interpret CPU tensors)"
    return None


@functools.cache
def _triton_found() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _native_refusal() -> str | None:
    return importlib.import_module("vlmamba.ops.native").refusal()


def _strength(name: str) -> str:
    if name == "triton":
        return "Triton kernels"
    return importlib.import_module("vlmamba.ops.native").describe()


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def check_shapes(op: str, **arguments: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    """ValueError for the first argument whose shape is not the expected one."""
    for name, (tensor, expected) in arguments.items():
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")


def check_seq_idx(op: str, seq_idx: torch.Tensor | None) -> None:
    """ValueError unless seq_idx is int32 (or int64)."""
    if seq_idx is not None and seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: seq_idx must be int32, got {seq_idx.dtype}")


def check_activation(op: str, activation: str | None) -> None:
    """ValueError unless the activation is one the kernels know."""
    if activation not in (None, "silu"):
        raise ValueError(f"{op}: unknown activation {activation!r}; expected None or 'silu'")
