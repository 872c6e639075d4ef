"""The causal convolution against float64 loops, and the identities that every implementation keeps."""

from __future__ import annotations

import oracle
import pytest
import torch
from forms import BOTH, EVERY_FORM, TOLERANCE, in_float64, packed, random_like
from oracle import error

from vlmamba import ops
from vlmamba.ops.causal_conv1d import _conv, causal_conv1d


def conv_inputs(B, L, D, W=4, dtype=torch.float32, initial=True):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x, initial_state = random_like(torch.empty(B, L, D, dtype=dtype), torch.empty(B, W - 1, D, dtype=dtype))
    weight, bias = random_like(torch.empty(D, W, dtype=exact), torch.empty(D, dtype=exact), seed=2)
    inputs = {"x": x, "weight": weight, "bias": bias}
    if initial:
        inputs["initial"] = initial_state
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def run(inputs, **options):
    options.setdefault("return_final_state", True)
    return causal_conv1d(
        inputs["x"], inputs["weight"], inputs.get("bias"), initial_state=inputs.get("initial"), **options
    )


def check(inputs, implementation, activation="silu", seq_idx=None):
    tolerance = TOLERANCE[inputs["x"].dtype]
    y, final = run(inputs, activation=activation, seq_idx=seq_idx, implementation=implementation)
    exact = in_float64(inputs)
    y64, final64 = oracle.conv(**exact, activation=activation, seq_idx=seq_idx)
    assert y.dtype == final.dtype == inputs["x"].dtype
    assert error(y, y64) < tolerance
    assert torch.equal(final.double(), final64)
    dy, dfinal = random_like(y, final)
    used = ((y, final), (dy, dfinal)) if "initial" in inputs else ((y,), (dy,))
    found = torch.autograd.grad(used[0], list(inputs.values()), used[1])
    exact_used = (y64, final64)[: len(used[0])]
    expected = torch.autograd.grad(exact_used, list(exact.values()), [t.double() for t in used[1]])
    for name, mine, theirs in zip(inputs, found, expected):
        assert mine.dtype == inputs[name].dtype
        assert error(mine, theirs) < tolerance, name


@EVERY_FORM
@pytest.mark.parametrize(("L", "D"), [(1, 5), (2, 33), (67, 16)])
@pytest.mark.parametrize("initial", [True, False])
def test_outputs_and_gradients(implementation, dtype, L, D, initial, poisoned):
    check(conv_inputs(2, L, D, dtype=dtype, initial=initial), implementation)


@BOTH
@pytest.mark.parametrize("W", [2, 3, 5])
def test_widths(implementation, W, poisoned):
    check(conv_inputs(2, 35, 9, W), implementation)


@BOTH
@pytest.mark.parametrize("activation", [None, "silu"])
def test_without_bias(implementation, activation, poisoned):
    inputs = conv_inputs(2, 35, 9, initial=False)
    del inputs["bias"]
    check(inputs, implementation, activation)


@EVERY_FORM
@pytest.mark.parametrize("initial", [True, False])
def test_packs_and_padding(implementation, dtype, initial, poisoned):
    inputs = conv_inputs(4, 70, 17, dtype=dtype, initial=initial)
    rows = ([(4, 1), (5, 31), (9, 1), (4, 37)], [(0, 30), (1, 2), (-1, 38)], [(-1, 70)], [(0, 2), (-1, 68)])
    check(inputs, implementation, seq_idx=packed(*rows))


@BOTH
def test_padding_is_never_read(implementation):
    seq_idx = packed([(0, 20), (-1, 13)], [(-1, 33)])
    inputs = {name: tensor.detach() for name, tensor in conv_inputs(2, 33, 9, initial=False).items()}
    inputs["x"][seq_idx < 0] = float("nan")
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    y, final = run(inputs, activation="silu", seq_idx=seq_idx, implementation=implementation)
    assert (y[seq_idx < 0] == 0).all()
    assert final.isfinite().all()
    (dy,) = random_like(y)
    dy[seq_idx < 0] = float("nan")
    for gradient in torch.autograd.grad(y, list(inputs.values()), dy):
        assert gradient.isfinite().all()


@BOTH
def test_packed_equals_separate_bit_for_bit(implementation):
    inputs = conv_inputs(1, 100, 21, initial=False)
    lengths = [3, 40, 1, 56]
    y, _ = run(
        inputs,
        activation="silu",
        seq_idx=packed([(i, length) for i, length in enumerate(lengths)]),
        implementation=implementation,
    )
    (dy,) = random_like(y)
    (dx,) = torch.autograd.grad(y, inputs["x"], dy)
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        start += length
        alone = {**inputs, "x": inputs["x"][:, span].detach().requires_grad_()}
        y_alone, _ = run(alone, activation="silu", implementation=implementation)
        assert torch.equal(y[:, span], y_alone)
        assert torch.equal(dx[:, span], torch.autograd.grad(y_alone, alone["x"], dy[:, span])[0])


@EVERY_FORM
@pytest.mark.parametrize("cut", [0, 1, 2, 40])
def test_a_convolution_in_two_parts(implementation, dtype, cut):
    inputs = {name: tensor.detach() for name, tensor in conv_inputs(2, 45, 10, dtype=dtype).items()}
    y, final = run(inputs, activation="silu", implementation=implementation)
    state, outputs = inputs["initial"], []
    for span in (slice(0, cut), slice(cut, 45)):
        part = {**inputs, "x": inputs["x"][:, span], "initial": state}
        out, state = run(part, activation="silu", implementation=implementation)
        outputs.append(out)
    assert torch.equal(torch.cat(outputs, 1), y)
    assert torch.equal(state, final)


@EVERY_FORM
def test_updates_equal_a_convolution(implementation, dtype):
    inputs = {name: tensor.detach() for name, tensor in conv_inputs(3, 9, 21, dtype=dtype).items()}
    y, final = run(inputs, activation="silu", implementation=implementation)
    state = inputs["initial"].clone()
    for t in range(9):
        x = inputs["x"][:, t]
        out = ops.conv_update(
            state, x, inputs["weight"], inputs["bias"], activation="silu", implementation=implementation
        )
        assert error(out, y[:, t]) < TOLERANCE[dtype]
    assert torch.equal(state, final)


@BOTH
def test_strided_input(implementation):
    wide = random_like(torch.empty(2, 66, 64))[0]
    for x in (wide[:, ::2, 3:20], wide[:, :17].transpose(1, 2)):
        inputs = conv_inputs(2, 1, 17)
        views, copies = ({**inputs, "x": t.detach().requires_grad_()} for t in (x, x.contiguous()))
        results = [run(t, activation="silu", implementation=implementation) for t in (views, copies)]
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@BOTH
@pytest.mark.parametrize(("B", "L"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(implementation, B, L):
    inputs = conv_inputs(B, L, 6)
    y, final = run(inputs, implementation=implementation)
    assert y.shape == (B, L, 6)
    assert torch.equal(final, inputs["initial"])
    gradients = torch.autograd.grad(y.sum() + final.sum(), list(inputs.values()))
    assert all((g == (1 if name == "initial" else 0)).all() for name, g in zip(inputs, gradients))


@BOTH
def test_torch_library(implementation):
    inputs = conv_inputs(2, 9, 5)
    given = (inputs["x"], inputs["weight"], inputs["bias"], "silu", inputs["initial"])
    seq_idx = packed([(0, 4), (1, 5)], [(0, 6), (-1, 3)])
    torch.library.opcheck(_conv, (*given, seq_idx, True, implementation))
    torch.library.opcheck(_conv, (inputs["x"], inputs["weight"], None, None, None, None, False, implementation))


@BOTH
def test_compiled_equals_eager(implementation):
    inputs = conv_inputs(2, 9, 5)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = [function(inputs, implementation=implementation) for function in (run, compiled)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results))
    gradients = [torch.autograd.grad(y.sum() + s.sum(), list(inputs.values())) for y, s in results]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients))


def test_bad_arguments():
    x, weight = torch.zeros(2, 9, 5), torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 4\), expected \(5, 4\)"):
        causal_conv1d(x, weight[:4])
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), expected \(5,\)"):
        causal_conv1d(x, weight, torch.zeros(4))
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 5, 3\), expected \(2, 3, 5\)"):
        causal_conv1d(x, weight, initial_state=torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="unknown activation 'gelu'"):
        causal_conv1d(x, weight, activation="gelu")
    with pytest.raises(ValueError, match=r"expected x \(B, L, D\)"):
        causal_conv1d(x[0], weight)
