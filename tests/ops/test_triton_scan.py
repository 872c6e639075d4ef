"""The Triton selective scan, one- and two-dimensional, against float64 loops: outputs, states and every gradient."""

from __future__ import annotations

import oracle
import pytest
import torch
from interpreter import DEVICE
from oracle import error

from vlmamba.ops.scan_2d import triton as scan_2d
from vlmamba.ops.selective_scan import reference
from vlmamba.ops.selective_scan import triton as scan

pytestmark = pytest.mark.usefixtures("poisoned")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
GRADIENTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial")


def inputs(B, L, D, N, dtype=torch.float32, seed=0, K=None):
    """Values as a trained model has them: dt between 0.001 and 0.1 after softplus, A between -1 and -N."""
    g = torch.Generator().manual_seed(seed)
    rows = (B, L) if K is None else (B, K, L)
    own = () if K is None else (K,)
    t = {
        "x": torch.randn(*rows, D, generator=g).to(dtype),
        "dt": (torch.randn(*rows, D, generator=g) * 0.5).to(dtype),
        "A": -torch.arange(1, N + 1).float().repeat(*own, D, 1) * (0.5 + torch.rand(*own, D, N, generator=g)),
        "B": torch.randn(*rows, N, generator=g).to(dtype),
        "C": torch.randn(*rows, N, generator=g).to(dtype),
        "D": torch.randn(*own, D, generator=g),
        "z": torch.randn(B, L, D, generator=g).to(dtype),
        "dt_bias": torch.log(torch.expm1(0.001 * 100 ** torch.rand(*own, D, generator=g))),
        "initial": torch.randn(B, D, N, generator=g),
    }
    return {name: value.to(DEVICE) for name, value in t.items()}


def gradients_of(outputs, grads, tensors):
    found = torch.autograd.grad(outputs, tensors, grads, allow_unused=True)
    return [torch.zeros_like(t) if f is None else f for t, f in zip(tensors, found)]


def check(t, seq_idx=None, dt_softplus=True, final=True):
    """Forward and backward of kernel and oracle on the same rounded inputs."""
    tolerance = TOLERANCE[t["x"].dtype]
    names = [name for name in GRADIENTS if t.get(name) is not None]
    args = [
        t["x"],
        t["dt"],
        t["A"],
        t["B"],
        t["C"],
        t.get("D"),
        t.get("z"),
        t.get("dt_bias"),
        dt_softplus,
        t.get("initial"),
        seq_idx,
    ]
    y, h, saved = scan.forward(*args, final)
    assert saved.shape == scan.saved_shape(*t["x"].shape, t["A"].shape[1])
    exact = {name: t[name].detach().double().cpu().requires_grad_() for name in names}
    y64, h64 = oracle.scan(**exact, dt_softplus=dt_softplus, seq_idx=None if seq_idx is None else seq_idx.cpu())
    assert error(y, y64) < tolerance
    if final:
        assert error(h, h64) < tolerance
    g = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=g).to(y.dtype).to(DEVICE)
    dh = torch.randn(h64.shape, generator=g).to(DEVICE) if final else None
    found = dict(zip(GRADIENTS, scan.backward(dy, dh, *args, saved)))
    outputs, grads = ((y64, h64), (dy.double().cpu(), dh.double().cpu())) if final else ((y64,), (dy.double().cpu(),))
    for name, expected in zip(names, gradients_of(outputs, grads, list(exact.values()))):
        assert found[name].dtype == t[name].dtype, name
        assert error(found[name], expected) < tolerance, name
    assert all(found[name] is None for name in GRADIENTS if t.get(name) is None)
    return y, h


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """The interpreter takes a tenth of a second for a step: short chunks bring every boundary within few steps."""
    monkeypatch.setattr(scan, "CHUNK", 8)


@pytest.mark.parametrize(
    ("B", "L", "D", "N"), [(1, 13, 40, 16), (2, 9, 5, 8), (1, 3, 5, 16), (1, 9, 20, 32), (1, 5, 9, 12), (1, 5, 8, 64)]
)
def test_every_gradient(B, L, D, N):
    check(inputs(B, L, D, N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(inputs(1, 11, 24, 16, dtype))


def test_bare():
    t = inputs(1, 9, 24, 16)
    check(
        {name: t[name] for name in ("x", "dt", "A", "B", "C")} | {"dt": t["dt"].abs() * 0.1},
        dt_softplus=False,
        final=False,
    )


def test_walks_cut_differently(monkeypatch):
    """The segments of the three walks (forward, backward's forward, back) need not be the same."""
    for name, rounds in (("ROUNDS", 1), ("ROUNDS_BACK", 1), ("ROUNDS_OUTPUT", 9)):
        monkeypatch.setattr(scan, name, rounds)
    t = inputs(1, 26, 100, 16)
    cuts = [scan.segment_length(4, 26, t["x"].device, rounds) for rounds in (1, 9)]
    assert DEVICE == "cuda" or cuts == [16, 8]
    check(t)
    check(t, torch.tensor([[0] * 9 + [1] * 10 + [-1] * 7], dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize(("low", "high"), [(-6, -2), (-2, 1), (1, 5), (5, 20)])
def test_steps_of_any_size(low, high):
    """Where dt is large, what a step adds to the state and takes from it nearly cancel: not in dA, a little in ddt."""
    t = inputs(1, 40, 32, 16)
    t |= {
        "dt": torch.rand(t["dt"].shape) * (high - low) + low,
        "dt_bias": torch.zeros(32),
        "A": -torch.arange(1, 17.0).repeat(32, 1),
    }
    t = {name: value.to(DEVICE) for name, value in t.items()}
    args = (*(t[n] for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True, t["initial"], None)
    exact = [a.double().cpu() if torch.is_tensor(a) else a for a in args]
    dy = torch.randn(t["x"].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = scan.backward(dy, t["initial"], *args, scan.forward(*args, True)[2])
    wanted = reference.backward(dy.double().cpu(), exact[9], *exact, reference.forward(*exact, True)[2])
    for name, got, expected in zip(GRADIENTS, found, wanted):
        assert error(got, expected) < (1e-4 if name.startswith("dt") else 1e-6), name


def test_unsaved():
    t = inputs(1, 9, 24, 16)
    args = (*(t[n] for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True, t["initial"], None, True)
    (y, h, saved), (plain_y, plain_h, _) = scan.forward(*args, save=False), scan.forward(*args)
    assert saved.numel() == 0
    assert torch.equal(y, plain_y)
    assert torch.equal(h, plain_h)


def test_resets_and_padding():
    t = inputs(3, 13, 8, 16)
    seq_idx = torch.tensor(
        [[0] * 3 + [1] * 8 + [2] * 2, [4] * 8 + [0] * 2 + [-1] * 3, [-1] * 13], dtype=torch.int32, device=DEVICE
    )
    y, h = check(t, seq_idx)
    assert (y[1, 10:] == 0).all()
    assert torch.equal(h[2], t["initial"][2])


def test_padding_is_never_read():
    t = inputs(1, 6, 32, 16)
    seq_idx = torch.tensor([[0] * 3 + [-1] * 3], dtype=torch.int32, device=DEVICE)

    def args(t):
        return *(t[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True, t["initial"], seq_idx

    dirty = dict(t)
    for name in ("x", "dt", "B", "C", "z"):
        dirty[name] = t[name].clone()
        dirty[name][:, 3:] = float("nan")
    dy, dh = torch.ones_like(t["x"]), torch.ones_like(t["initial"])
    dirty_dy = dy.clone()
    dirty_dy[:, 3:] = float("nan")
    y, h, saved = scan.forward(*args(t), True)
    clean = [y, h, *scan.backward(dy, dh, *args(t), saved)]
    y, h, saved = scan.forward(*args(dirty), True)
    for a, b in zip(clean, [y, h, *scan.backward(dirty_dy, dh, *args(dirty), saved)]):
        assert torch.equal(a, b)


def test_strided_views():
    """Halves of in_proj's output and slices of x_proj's, at an odd offset that no packed load can take."""
    t = inputs(1, 6, 24, 16)
    xz = torch.cat([t["x"], t["z"]], -1)
    low = torch.cat([t["x"][..., :3], t["B"], t["C"]], -1)
    check(t | {"x": xz[..., :24], "z": xz[..., 24:], "B": low[..., 3:19], "C": low[..., 19:]})
    check(t | {"x": t["x"].transpose(0, 1).contiguous().transpose(0, 1), "dt": t["dt"].mT.contiguous().mT})


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8)])
def test_nothing_to_scan(shape):
    B, L, D = shape
    t = inputs(B, L, D, 16)
    args = (t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], t["z"], t["dt_bias"], True, t["initial"], None)
    y, h, saved = scan.forward(*args, True)
    assert y.shape == shape
    assert torch.equal(h, t["initial"])
    found = scan.backward(y, torch.ones_like(h), *args, saved)
    assert (found[2] == 0).all()
    assert (found[8] == 1).all()


def test_clear_errors():
    t = inputs(1, 4, 8, 16)
    args = (t["x"].double(), t["dt"], t["A"], t["B"], t["C"], None, None, None, True, None, None, False)
    with pytest.raises(ValueError, match=r"selective_scan: x is torch\.float64"):
        scan.forward(*args)


def test_split_continues():
    """A scan of two halves, the second from the state of the first, is the scan of the whole."""
    t = inputs(1, 12, 32, 16)
    whole, final, _ = scan.forward(
        *(t[n] for n in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True, t["initial"], None, True
    )
    state, parts = t["initial"], []
    for part in (slice(0, 5), slice(5, 12)):
        y, state, _ = scan.forward(
            t["x"][:, part], t["dt"][:, part], t["A"], t["B"][:, part], t["C"][:, part], t["D"], t["z"][:, part],
            t["dt_bias"], True, state, None, True,
        )  # fmt: skip
        parts.append(y)
    assert error(torch.cat(parts, 1), whole) < 1e-6
    assert error(state, final) < 1e-6


@pytest.mark.parametrize(("orders", "grid"), [((0, 1, 2, 3), (3, 2)), ((3,), (2, 4))])
def test_grid(orders, grid):
    h, w = grid
    K = len(orders)
    t = inputs(1, h * w, 24, 16, K=K)
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    args = [t[name] for name in names]
    y, saved = scan_2d.scan_forward(*args, True, h, w, orders)
    assert saved.shape == scan_2d.saved_shape(1, K, h * w, 24, 16)
    exact = [a.double().cpu().requires_grad_() for a in args]
    y64 = oracle.scan_2d(*exact, h, w, orders)
    assert error(y, y64) < 1e-5
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = scan_2d.scan_backward(dy, *args, True, h, w, orders, saved)
    for name, got, expected in zip(names, found, torch.autograd.grad(y64, exact, dy.double().cpu())):
        assert error(got, expected) < 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "L", "D", "N"), [(2, 1024, 5120, 16), (16, 257, 768, 16), (1, 4099, 130, 8), (2, 500, 384, 64)]
)
def test_real_sizes_match_and_repeat(B, L, D, N):
    """Half precision against float32, which the small cases hold to float64, and two runs against each other, bit for
    bit."""
    t = inputs(B, L, D, N, torch.bfloat16)
    wide = {name: value.float() for name, value in t.items()}

    def call(t):
        return *(t[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")), True, t["initial"], None

    dy, dh = torch.randn_like(t["x"]), torch.randn_like(t["initial"])

    def run(t, dy):
        y, h, saved = scan.forward(*call(t), True)
        return y, h, *scan.backward(dy, dh, *call(t), saved)

    first, second, expected = run(t, dy), run(t, dy), run(wide, dy.float())
    for a, b, c in zip(first, second, expected):
        assert torch.equal(a, b)
        assert error(a, c) < 8e-3
