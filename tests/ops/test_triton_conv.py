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
    """The interpreter is slow: short chunks of several groups bring every boundary within few steps."""
    monkeypatch.setattr(conv, "CHUNK", (8, 8))
    monkeypatch.setattr(conv, "T", (4, 4))


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


@pytest.mark.parametrize("W", [2, 3, 5, 7])
def test_widths(W):
    numbers = torch.tensor([[0] * 10, [0] * 4 + [1] * 5 + [-1]], dtype=torch.int32, device=DEVICE)
    check(inputs(2, 10, 16, W), seq_idx=numbers)


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


def test_a_new_sequence_or_padding_anywhere():
    """Groups are of 4 steps, chunks of 8: every place relative to their borders, in both."""
    L = 13
    rows = [[2 * (t % 2)] * t + [1] * (L - t) for t in range(1, L)]
    rows += [[7] * t + [-1] * (L - t) for t in range(1, L)]
    rows += [[0] * (t - 1) + [1] + [2] * (L - t) for t in (4, 5, 8, 9)]
    seq_idx = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    check(inputs(len(rows), L, 8), seq_idx=seq_idx)


def run(t, dy, seq_idx=None):
    """y and the gradients of x, weight, bias."""
    args = (t["x"], t["weight"], t["bias"], "silu", None, seq_idx)
    return conv.forward(*args, False)[0], *conv.backward(dy, None, *args)[:3]


def upstream(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device, x.dtype)


def test_padding_is_never_read():
    """NaN in padded inputs and gradients changes nothing, and what belongs to padding is zero."""
    rows = [[0] * 6 + [-1] * 11, [-1] * 17, [0] * 3 + [1] * 5 + [-1] * 9, [2] * 16 + [-1]]
    seq_idx = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    t = inputs(4, 17, 16)
    dy = upstream(t["x"])
    clean = run(t, dy, seq_idx)
    for value in (t["x"], dy):
        value[seq_idx < 0] = float("nan")
    again = run(t, dy, seq_idx)
    assert all(torch.equal(one, other) for one, other in zip(clean, again))
    assert (again[0][seq_idx < 0] == 0).all()
    assert (again[1][seq_idx < 0] == 0).all()


def test_packed_equals_separate_bit_for_bit():
    """So groups of one sequence and groups with a border between sequences compute the same."""
    t = inputs(1, 26, 16)
    dy = upstream(t["x"])
    lengths = [9, 1, 13, 3]
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None].int().to(DEVICE)
    y, dx, *_ = run(t, dy, numbers)
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        start += length
        y_alone, dx_alone, *_ = run({**t, "x": t["x"][:, span]}, dy[:, span])
        assert torch.equal(y[:, span], y_alone)
        assert torch.equal(dx[:, span], dx_alone)


def test_how_a_row_is_cut_does_not_matter(monkeypatch):
    """Two runs agree bit for bit; other chunks and groups change the sums over steps alone, in their last digits."""
    t = inputs(2, 21, 40)
    dy = upstream(t["x"])
    first = run(t, dy)
    assert all(torch.equal(one, other) for one, other in zip(first, run(t, dy)))
    for chunk, together, block in (((4, 4), 4, 512), ((16, 16), 8, 512), ((8, 24), 4, 32), ((24, 24), 2, 32)):
        monkeypatch.setattr(conv, "CHUNK", chunk)
        monkeypatch.setattr(conv, "T", (together, together))
        monkeypatch.setattr(conv, "BLOCK", block)
        other = run(t, dy)
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
        assert error(other[2], first[2]) < 1e-6
        assert error(other[3], first[3]) < 1e-6


def test_long_rows_are_cut_in_longer_chunks(monkeypatch):
    monkeypatch.setattr(conv, "CHUNK", (16, 128))
    monkeypatch.setattr(conv, "multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    assert conv._cut(5120, 2048, 8, device) == ({"BLOCK_D": 512, "num_warps": 4}, 10, 96)
    assert conv._cut(5120, 1024, 1, device)[2] == 16
    assert conv._cut(5120, 8192, 8, device)[2] == 128
    assert conv._cut(40, 5, 1, device) == ({"BLOCK_D": 64, "num_warps": 1}, 1, 16)


def test_strided_views():
    t = inputs(1, 9, 24)
    wide = torch.cat([t["x"], t["x"]], -1)
    check(t | {"x": wide[..., :24]})
    check(t | {"x": t["x"].mT.contiguous().mT})
    dy = upstream(t["x"])
    right = run(t, dy)
    for views in (torch.cat([dy, dy], -1)[..., 24:], torch.stack([dy, dy], 2)[:, :, 1], dy.mT.contiguous().mT):
        assert all(torch.equal(one, other) for one, other in zip(right, run(t, views)))


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
