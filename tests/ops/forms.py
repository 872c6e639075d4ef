"""Which implementation is tested in which dtype, how close it must come, and the inputs of a scan."""

from __future__ import annotations

import pytest
import torch

from vlmamba.ops import native

# Relative error in the 2-norm against float64 loops. Half precision: one rounding of the result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

_native = pytest.mark.skipif(native.refusal() is not None, reason=str(native.refusal()))
FORMS = [
    pytest.param("reference", torch.float64, id="reference-fp64"),
    pytest.param("reference", torch.float32, id="reference-fp32"),
    pytest.param("cpu", torch.float32, id="cpu-fp32", marks=_native),
    pytest.param("cpu", torch.bfloat16, id="cpu-bf16", marks=_native),
]
EVERY_FORM = pytest.mark.parametrize(("implementation", "dtype"), FORMS)
BOTH = pytest.mark.parametrize("implementation", ["reference", pytest.param("cpu", marks=_native)])


def scan_inputs(B, L, D, N=16, dtype=torch.float32, seed=0):
    """x, dt, z, B, C in `dtype`, the rest in float32 (float64 for float64), requiring gradients."""
    generator = torch.Generator().manual_seed(seed)
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    inputs = {
        "x": normal(B, L, D),
        "dt": normal(B, L, D),
        "A": -(0.1 + 3 * torch.rand(D, N, generator=generator, dtype=torch.float64)).to(exact),
        "B": normal(B, L, N),
        "C": normal(B, L, N),
        "D": normal(D, dtype=exact),
        "z": normal(B, L, D),
        "dt_bias": normal(D, dtype=exact),
        "initial": normal(B, D, N, dtype=exact),
    }
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def in_float64(inputs):
    return {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}


def random_like(*tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors]


def packed(*rows):
    """seq_idx from rows of (sequence number, length)."""
    return torch.tensor([[number for number, length in row for _ in range(length)] for row in rows], dtype=torch.int32)
