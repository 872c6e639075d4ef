"""Sum and norm in one pass: kernel and plain torch against float64, values and gradients, odd sizes."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE
from torch.testing import assert_close

from vlmamba.ops.add_norm import add_norm, rms_norm

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-3
FORMS = ("reference", "triton")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def noise(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype).requires_grad_()


def compare(found, expected, dtype: torch.dtype) -> None:
    for a, b in zip(found, expected, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 6), (2, 3, 7), (5, 33), (19, 64), (2, 129), (3, 1300)])
def test_sum_and_norm(form, stream, dtype, shape):
    """Both results and every gradient, from either result or both."""
    coarse = max((stream, dtype), key=TOLERANCE.__getitem__)
    x, delta = noise(*shape, dtype=stream, seed=0), noise(*shape, dtype=dtype, seed=1)
    weight = noise(shape[-1], dtype=dtype, seed=2)
    dnormed, dsummed = noise(*shape, dtype=dtype, seed=3), noise(*shape, dtype=stream, seed=4)
    normed, summed = add_norm(x, delta, weight, EPS, dtype, form)
    assert (normed.dtype, summed.dtype) == (dtype, stream)
    wide = [t.detach().double().requires_grad_() for t in (x, delta, weight)]
    total = wide[0] + wide[1]
    total = total + (summed.detach().double() - total).detach()  # the norm is that of the sum as it is stored
    both = (exact(total, wide[2]), total)
    compare((normed, summed), both, coarse)
    for chosen in ((0, 1), (0,), (1,)):
        results, grads = (normed, summed), (dnormed.detach(), dsummed.detach())
        found = torch.autograd.grad(
            [results[i] for i in chosen], (x, delta, weight), [grads[i] for i in chosen], True, allow_unused=True
        )
        right = torch.autograd.grad(
            [both[i] for i in chosen], wide, [grads[i].double() for i in chosen], True, allow_unused=True
        )
        if chosen == (1,):  # the weight has no part in the sum
            assert found[2] is None or not found[2].any()
            found, right = found[:2], right[:2]
        assert all(f.dtype == t.dtype for f, t in zip(found, (x, delta, weight)))
        compare(found, right, coarse)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_norm_alone_over_strided_rows(form, rows):
    """A view of every other row, and enough rows that a program of the backward kernel takes several."""
    base = noise(rows, 2, 20, dtype=torch.float32, seed=rows)
    weight = noise(20, dtype=torch.float32, seed=9)
    normed = rms_norm(base[:, 1], weight, EPS, torch.float32, form)
    wide, wide_weight = base.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    right = exact(wide[:, 1], wide_weight)
    dy = noise(rows, 20, dtype=torch.float32, seed=5).detach()
    compare([normed], [right], torch.float32)
    found = torch.autograd.grad(normed, (base, weight), dy)
    compare(found, torch.autograd.grad(right, (wide, wide_weight), dy.double()), torch.float32)
    with torch.no_grad():  # without a gradient the kernel is called directly: the same numbers
        assert_close(rms_norm(base[:, 1], weight, EPS, torch.float32, form), normed, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form):
    x, weight = noise(2, 0, 8, dtype=torch.float32, seed=0), noise(8, dtype=torch.float32, seed=1)
    normed, summed = add_norm(x, x, weight, EPS, torch.bfloat16, form)
    assert normed.shape == summed.shape == (2, 0, 8)
    assert not torch.autograd.grad(normed.sum(), weight)[0].any()


def test_shapes_that_do_not_fit():
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"delta has shape \(8,\), expected \(2, 8\)"):
        add_norm(x, weight, weight, EPS, torch.float32)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\), expected \(8,\)"):
        rms_norm(x, torch.zeros(7), EPS, torch.float32)
