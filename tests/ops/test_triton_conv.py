"""The Triton convolution, one- and two-dimensional, against float64 loops: outputs, states and every gradient."""

from __future__ import annotations

import oracle
import pytest
import torch
from interpreter import DEVICE
from oracle import error

from vlmamba.ops.causal_conv1d import triton as conv
from vlmamba.ops.scan_2d import triton as scan_2d

pytestmark = pytest.mark.usefixtures("poisoned")
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """The interpreter is slow: short chunks and tiles bring every boundary within few steps."""
    monkeypatch.setattr(conv, "CHUNK", 8)
    monkeypatch.setattr(conv, "TILE", (4, 256))


def inputs(B, L, D, W=4, dtype=torch.float32, K=None):
    g = torch.Generator().manual_seed(0)
    own = () if K is None else (K,)
    t = {
        "x": torch.randn(B, L, D, generator=g).to(dtype),
        "weight": torch.randn(*own, D, W, generator=g),
        "bias": torch.randn(*own, D, generator=g),
        "initial": torch.randn(B, W - 1, D, generator=g).to(dtype),
    }
    return {name: value.to(DEVICE) for name, value in t.items()}


def check(t, activation="silu", seq_idx=None):
    tolerance = TOLERANCE[t["x"].dtype]
    args = (t["x"], t["weight"], t.get("bias"), activation, t.get("initial"), seq_idx)
    y, final = conv.forward(*args, True)
    exact = {name: value.double().cpu().requires_grad_() for name, value in t.items()}
    y64, final64 = oracle.conv(**exact, activation=activation, seq_idx=None if seq_idx is None else seq_idx.cpu())
    assert error(y, y64) < tolerance
    assert torch.equal(final.double().cpu(), final64)
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g).to(y.dtype).to(DEVICE)
    dfinal = torch.randn(final.shape, generator=g).to(y.dtype).to(DEVICE)
    found = dict(zip(("x", "weight", "bias", "initial"), conv.backward(dy, dfinal, *args)))
    expected = torch.autograd.grad((y64, final64), list(exact.values()), (dy.double().cpu(), dfinal.double().cpu()))
    for name, gradient in zip(exact, expected):
        assert error(found[name], gradient) < tolerance, name
    assert all(found[name] is None for name in found if name not in t)
    return y, final


@pytest.mark.parametrize(("B", "L", "D"), [(2, 11, 40), (1, 16, 33), (1, 2, 8), (1, 1, 5), (1, 18, 32)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_every_gradient(B, L, D, activation):
    check(inputs(B, L, D), activation)


@pytest.mark.parametrize("W", [2, 3, 5])
def test_widths(W):
    check(inputs(1, 10, 16, W))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(inputs(1, 14, 40, dtype=dtype))


def test_bare():
    t = inputs(1, 9, 16)
    check({"x": t["x"], "weight": t["weight"]})


def test_resets_and_padding():
    rows = [
        [0] * 6 + [1] * 1 + [2] * 1 + [3] * 9,
        [5] * 8 + [-1] * 9,
        [0] * 7 + [1] * 2 + [-1] * 8,
        [-1] * 17,
        [0] * 2 + [-1] * 15,
    ]
    seq_idx = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    t = inputs(5, 17, 16)
    y, final = check(t, seq_idx=seq_idx)
    assert (y[1, 8:] == 0).all()
    assert torch.equal(final[3], t["initial"][3])
    t["x"][seq_idx < 0] = float("nan")
    again, final_again = conv.forward(t["x"], t["weight"], t["bias"], "silu", t["initial"], seq_idx, True)
    assert torch.equal(y, again)
    assert torch.equal(final, final_again)


def test_strided_views():
    t = inputs(1, 9, 24)
    wide = torch.cat([t["x"], t["x"]], -1)
    check(t | {"x": wide[..., :24]})
    check(t | {"x": t["x"].mT.contiguous().mT})


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_nothing_to_convolve(shape):
    t = inputs(*shape)
    y, final = conv.forward(t["x"], t["weight"], t["bias"], "silu", t["initial"], None, True)
    assert y.shape == shape
    assert torch.equal(final, t["initial"])
    found = conv.backward(y, torch.ones_like(final), t["x"], t["weight"], t["bias"], "silu", t["initial"], None)
    assert (found[1] == 0).all()
    assert (found[3] == 1).all()


def test_clear_errors():
    t = inputs(1, 4, 8)
    with pytest.raises(ValueError, match=r"causal_conv1d: x is torch\.float64"):
        conv.forward(t["x"].double(), t["weight"], None, None, None, None, False)


@pytest.mark.parametrize(("orders", "grid"), [((0, 1, 2, 3), (3, 5)), ((2, 1), (5, 2))])
def test_grid(orders, grid):
    h, w = grid
    t = inputs(1, h * w, 24, K=len(orders))
    args = (t["x"], t["weight"], t["bias"])
    y = scan_2d.conv_forward(*args, "silu", h, w, orders)
    exact = [a.double().cpu().requires_grad_() for a in args]
    y64 = oracle.conv_2d(*exact, h, w, orders, "silu")
    assert error(y, y64) < 5e-6
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = scan_2d.conv_backward(dy, *args, "silu", h, w, orders)
    for got, expected in zip(found, torch.autograd.grad(y64, exact, dy.double().cpu())):
        assert error(got, expected) < 5e-6
