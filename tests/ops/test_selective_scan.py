"""The selective scan against float64 loops, and the identities that every implementation keeps."""

from __future__ import annotations

import oracle
import pytest
import torch
from forms import BOTH, EVERY_FORM, TOLERANCE, in_float64, packed, random_like, scan_inputs
from oracle import error

from vlmamba import ops
from vlmamba.ops import native
from vlmamba.ops.selective_scan import _scan, selective_scan


def run(inputs, **options):
    """The public function on a dictionary of inputs; y and the final state."""
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    options.setdefault("return_final_state", True)
    return selective_scan(*(inputs.get(name) for name in names), initial_state=inputs.get("initial"), **options)


def check(inputs, implementation, seq_idx=None, dt_softplus=True):
    """Outputs, final state and every gradient against the loop."""
    tolerance = TOLERANCE[inputs["x"].dtype]
    y, final = run(inputs, implementation=implementation, seq_idx=seq_idx, dt_softplus=dt_softplus)
    exact = in_float64(inputs)
    y64, final64 = oracle.scan(**exact, seq_idx=seq_idx, dt_softplus=dt_softplus)
    assert y.dtype == inputs["x"].dtype
    assert final.dtype == inputs["A"].dtype
    assert error(y, y64) < tolerance
    assert error(final, final64) < min(tolerance, TOLERANCE[torch.float32])
    dy, dfinal = random_like(y, final)
    found = torch.autograd.grad((y, final), list(inputs.values()), (dy, dfinal))
    expected = torch.autograd.grad((y64, final64), list(exact.values()), (dy.double(), dfinal.double()))
    for name, mine, theirs in zip(inputs, found, expected):
        assert mine.dtype == inputs[name].dtype
        assert error(mine, theirs) < tolerance, name


@EVERY_FORM
@pytest.mark.parametrize(("L", "D"), [(1, 5), (7, 33), (63, 16)])
def test_outputs_and_gradients(implementation, dtype, L, D, poisoned):
    check(scan_inputs(2, L, D, dtype=dtype), implementation)


@BOTH
@pytest.mark.parametrize("N", [1, 5, 8, 20, 64])
def test_state_sizes(implementation, N, poisoned):
    check(scan_inputs(1, 35, 18, N), implementation)


@BOTH
def test_long(implementation, poisoned):
    check(scan_inputs(1, 500, 3), implementation)


@BOTH
@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial"])
def test_absent_inputs(implementation, absent, poisoned):
    inputs = scan_inputs(2, 34, 9)
    del inputs[absent]
    check(inputs, implementation)


@BOTH
def test_without_softplus(implementation):
    inputs = scan_inputs(2, 34, 9)
    inputs["dt"] = inputs["dt"].detach().abs().requires_grad_()
    inputs["dt_bias"] = inputs["dt_bias"].detach().abs().requires_grad_()
    check(inputs, implementation, dt_softplus=False)


@EVERY_FORM
def test_packs_and_padding(implementation, dtype, poisoned):
    """Sequences of one step, ones that end with a chunk, a number that comes back, padding, a row of padding alone."""
    inputs = scan_inputs(3, 70, 17, dtype=dtype)
    seq_idx = packed([(4, 1), (5, 31), (9, 1), (4, 37)], [(0, 30), (1, 3), (-1, 37)], [(-1, 70)])
    check(inputs, implementation, seq_idx)


@BOTH
def test_padding_is_never_read(implementation):
    """NaN at padding reaches no output and no gradient; what is not padding is as if it had stood alone."""
    seq_idx = packed([(0, 20), (-1, 13)], [(-1, 33)])
    clean = scan_inputs(2, 33, 9)
    dirty = {name: tensor.detach().clone() for name, tensor in clean.items()}
    for name in ("x", "dt", "B", "C", "z"):
        dirty[name][seq_idx < 0] = float("nan")
    dirty = {name: tensor.requires_grad_() for name, tensor in dirty.items()}
    y, final = run(dirty, implementation=implementation, seq_idx=seq_idx)
    assert (y[seq_idx < 0] == 0).all()
    assert torch.equal(final[1], dirty["initial"][1])
    alone = {n: t[:1, :20] if n in ("x", "dt", "B", "C", "z") else t for n, t in clean.items()}
    alone["initial"] = clean["initial"][:1]
    y_alone, final_alone = run(alone, implementation=implementation)
    assert torch.equal(y[:1, :20], y_alone)
    assert torch.equal(final[:1], final_alone)
    dy, dfinal = random_like(y, final)
    dy[seq_idx < 0] = float("nan")
    for name, gradient in zip(dirty, torch.autograd.grad((y, final), list(dirty.values()), (dy, dfinal))):
        assert gradient.isfinite().all(), name
        if name in ("x", "dt", "B", "C", "z"):
            assert (gradient[seq_idx < 0] == 0).all(), name


@BOTH
@pytest.mark.parametrize("D", [7, 24])
def test_packed_equals_separate_bit_for_bit(implementation, D):
    inputs = scan_inputs(1, 100, D)
    del inputs["initial"]
    lengths = [3, 40, 1, 56]
    seq_idx = packed([(i, length) for i, length in enumerate(lengths)])
    per_step = ("x", "dt", "B", "C", "z")
    y, _ = run(inputs, implementation=implementation, seq_idx=seq_idx)
    (dy,) = random_like(y)
    gradients = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy)))
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        start += length
        alone = {n: (t[:, span] if n in per_step else t).detach().requires_grad_() for n, t in inputs.items()}
        y_alone, _ = run(alone, implementation=implementation)
        assert torch.equal(y[:, span], y_alone)
        found = torch.autograd.grad(y_alone, list(alone.values()), dy[:, span])
        for name, gradient in zip(alone, found):
            if name in per_step:
                assert torch.equal(gradients[name][:, span], gradient), name


def test_packed_parameter_gradients():
    """Sums over sequences, so only the order of addition differs."""
    inputs = scan_inputs(1, 50, 6, dtype=torch.float64)
    del inputs["initial"]
    parameters = [inputs[name] for name in ("A", "D", "dt_bias")]
    y, _ = run(inputs, seq_idx=packed([(0, 13), (1, 37)]))
    whole = torch.autograd.grad(y.sum(), parameters)
    parts = []
    for span in (slice(0, 13), slice(13, 50)):
        part = {n: t[:, span] if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
        parts.append(torch.autograd.grad(run(part)[0].sum(), parameters))
    for total, first, second in zip(whole, *parts):
        assert error(total, first + second) < 1e-12


@EVERY_FORM
@pytest.mark.parametrize("cut", [0, 1, 32, 45])
def test_a_scan_in_two_parts(implementation, dtype, cut):
    inputs = scan_inputs(2, 45, 10, dtype=dtype)
    y, final = run(inputs, implementation=implementation)
    state, outputs = inputs["initial"], []
    for span in (slice(0, cut), slice(cut, 45)):
        part = {n: t[:, span] if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
        out, state = run({**part, "initial": state}, implementation=implementation)
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, 1), y)
    assert torch.equal(state, final)


@EVERY_FORM
def test_updates_equal_a_scan(implementation, dtype):
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(3, 20, 21, dtype=dtype).items()}
    y, final = run(inputs, implementation=implementation)
    state = inputs["initial"].clone()
    for t in range(20):
        x, dt, B, C, z = (inputs[name][:, t] for name in ("x", "dt", "B", "C", "z"))
        out = ops.state_update(
            state, x, dt, inputs["A"], B, C, inputs["D"], z, inputs["dt_bias"], implementation=implementation
        )
        assert error(out, y[:, t]) < TOLERANCE[dtype]
    assert error(state, final) < min(TOLERANCE[dtype], TOLERANCE[torch.float32])


@EVERY_FORM
def test_strided_inputs(implementation, dtype):
    """Halves of one projection, slices of another, every second position, and channels that are not contiguous."""
    wide = random_like(torch.empty(2, 66, 64, dtype=dtype))[0]
    plain = scan_inputs(2, 33, 11, 8, dtype=dtype)
    views = dict(plain)
    views["x"], views["z"] = wide[:, ::2, :11], wide[:, ::2, 20:31]
    views["B"], views["C"] = wide[:, 1::2, 31:39], wide[:, 1::2, 39:47]
    views["dt"] = wide[:, :11].transpose(1, 2)[:, :33]
    copies = {name: tensor.detach().contiguous().requires_grad_() for name, tensor in views.items()}
    views = {name: tensor.detach().requires_grad_() for name, tensor in views.items()}
    y, final = run(views, implementation=implementation)
    y_copy, final_copy = run(copies, implementation=implementation)
    assert torch.equal(y, y_copy)
    assert torch.equal(final, final_copy)
    dy = random_like(y)[0].transpose(0, 1).contiguous().transpose(0, 1)
    found = torch.autograd.grad(y, list(views.values()), dy)
    expected = torch.autograd.grad(y_copy, list(copies.values()), dy)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected))


@BOTH
@pytest.mark.parametrize(("B", "L"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(implementation, B, L):
    inputs = scan_inputs(B, L, 6)
    y, final = run(inputs, implementation=implementation)
    assert y.shape == (B, L, 6)
    assert torch.equal(final, inputs["initial"])
    gradients = torch.autograd.grad(y.sum() + final.sum(), list(inputs.values()))
    assert all((g == (1 if name == "initial" else 0)).all() for name, g in zip(inputs, gradients))


@BOTH
def test_extreme_values(implementation):
    """Steps from 1e-11 to 60 (large negative dt keep their relative accuracy), decays to nothing, closed gates."""
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(1, 40, 16).items()}
    inputs["dt"] = torch.linspace(-25, 60, 40)[None, :, None].expand(1, 40, 16)
    inputs["z"] = torch.linspace(-120, 120, 16).expand(1, 40, 16)
    inputs["A"] = inputs["A"] * 40
    del inputs["dt_bias"]
    y, final = run(inputs, implementation=implementation)
    y64, final64 = oracle.scan(**in_float64(inputs))
    assert torch.allclose(y.double(), y64, rtol=1e-4, atol=1e-9)
    assert torch.allclose(final.double(), final64, rtol=1e-5, atol=1e-9)


@BOTH
def test_a_nan_stays_visible(implementation):
    for name in ("x", "dt", "A"):
        inputs = {key: tensor.detach().clone() for key, tensor in scan_inputs(1, 5, 4).items()}
        inputs[name].flatten()[0] = float("nan")
        assert run(inputs, implementation=implementation)[1].isnan().any(), name


def test_memory_for_backward():
    """The states kept for backward are a small part of L x D x N."""
    for implementation in ("reference", *(["cpu"] if native.refusal() is None else [])):
        inputs = {name: tensor.detach() for name, tensor in scan_inputs(1, 256, 32).items()}
        names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
        _, _, saved = _scan(*(inputs[name] for name in names), True, None, None, False, implementation)
        assert saved.numel() * 16 <= 256 * 32 * 16


@BOTH
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_from_one_result(implementation, used):
    """Only y, or only the final state, goes into the loss."""
    inputs = scan_inputs(2, 20, 5)
    exact = in_float64(inputs)
    result, expected = run(inputs, implementation=implementation)[used], oracle.scan(**exact)[used]
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(result.sum(), list(inputs.values()), **options)
    for mine, theirs in zip(found, torch.autograd.grad(expected.sum(), list(exact.values()), **options)):
        assert error(mine, theirs) < TOLERANCE[torch.float32]


@BOTH
def test_gradients_to_chosen_inputs_only(implementation):
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(1, 9, 5).items()}
    inputs["x"].requires_grad_()
    y, final = run(inputs, implementation=implementation, return_final_state=False)
    assert final.numel() == 0
    y.sum().backward()
    assert inputs["x"].grad is not None


@BOTH
def test_torch_library(implementation):
    inputs = scan_inputs(2, 9, 5)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    seq_idx = packed([(0, 4), (1, 5)], [(0, 6), (-1, 3)])
    given = tuple(inputs[name] for name in names)
    torch.library.opcheck(_scan, (*given, True, inputs["initial"], seq_idx, True, implementation))
    torch.library.opcheck(_scan, (*given[:5], None, None, None, False, None, None, False, implementation))


@BOTH
def test_compiled_equals_eager(implementation):
    def layer(inputs):
        y, final = run(inputs, implementation=implementation)
        return y * 2, final

    inputs = scan_inputs(2, 9, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            results = [function(inputs) for function in (layer, compiled)]
        for mine, theirs in zip(*results):
            assert torch.equal(mine, theirs)
        if grad:
            gradients = [torch.autograd.grad(y.sum() + s.sum(), list(inputs.values())) for y, s in results]
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("dt", (2, 8, 5)),
        ("A", (6, 16)),
        ("B", (2, 9, 5)),
        ("C", (1, 9, 16)),
        ("D", (5, 1)),
        ("z", (2, 9, 4)),
        ("dt_bias", (1,)),
        ("initial", (2, 16, 5)),
    ],
)
def test_shapes_that_do_not_fit(name, shape):
    inputs = scan_inputs(2, 9, 5)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match="selective_scan") as caught:
        run(inputs)
    assert str(shape) in str(caught.value) or name == "A"


def test_other_bad_arguments():
    inputs = scan_inputs(2, 9, 5)
    with pytest.raises(ValueError, match=r"seq_idx has shape \(9,\), expected \(2, 9\)"):
        run(inputs, seq_idx=torch.zeros(9, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"seq_idx must be int32, got torch.float32"):
        run(inputs, seq_idx=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="unknown implementation 'fast'"):
        run(inputs, implementation="fast")
    with pytest.raises(ValueError, match=r"expected x \(B, L, D\)"):
        selective_scan(*(torch.zeros(4, 4) for _ in range(5)))
