"""One-token updates: chosen slots, strides, tracing, errors. (Their arithmetic: `test_updates_equal_a_scan`.)"""

from __future__ import annotations

import oracle
import pytest
import torch
from forms import BOTH, EVERY_FORM, TOLERANCE, packed, random_like, scan_inputs
from oracle import error

from vlmamba import ops
from vlmamba.ops.state_update import _conv_update, _update, conv_update, state_update

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")


def token(B, D, N=16, dtype=torch.float32):
    """The arguments of one update after the state, without gradients."""
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(B, 1, D, N, dtype).items()}
    return [inputs[name][:, 0] if name in ("x", "dt", "B", "C", "z") else inputs[name] for name in NAMES]


def loop(state, arguments):
    """One step of the float64 scan from the given states."""
    inputs = {name: tensor.double() for name, tensor in zip(NAMES, arguments)}
    inputs = {n: t[:, None] if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()}
    y, final = oracle.scan(**inputs, initial=state.double())
    return y[:, 0], final


@EVERY_FORM
@pytest.mark.parametrize(("D", "N"), [(5, 16), (33, 8), (16, 64), (7, 3)])
def test_slots(implementation, dtype, D, N, poisoned):
    """The chosen states advance, the others stay as they are to the bit."""
    arguments = token(3, D, N, dtype)
    (state,) = random_like(torch.zeros(6, D, N, dtype=torch.float64 if dtype == torch.float64 else torch.float32))
    slots = torch.tensor([4, 0, 3])
    y64, final64 = loop(state[slots], arguments)
    before = state.clone()
    y = state_update(state, *arguments, slots=slots, implementation=implementation)
    assert y.dtype == dtype
    assert error(y, y64) < TOLERANCE[dtype]
    assert error(state[slots], final64) < min(TOLERANCE[dtype], TOLERANCE[torch.float32])
    others = [1, 2, 5]
    assert torch.equal(state[others], before[others])


@BOTH
@pytest.mark.parametrize("absent", ["D", "z", "dt_bias"])
def test_absent_inputs(implementation, absent):
    arguments = dict(zip(NAMES, token(2, 9)))
    (state,) = random_like(torch.zeros(2, 9, 16))
    if absent == "z":
        gate = arguments["z"] = torch.full_like(arguments["z"], 3.0)
        y64, _ = loop(state, list(arguments.values()))
        y64 = y64 / (gate * gate.sigmoid()).double()
    else:
        arguments[absent] = torch.zeros(9)
        y64, _ = loop(state, list(arguments.values()))
    arguments[absent] = None
    y = state_update(state, *arguments.values(), implementation=implementation)
    assert error(y, y64) < TOLERANCE[torch.float32]


@BOTH
def test_without_softplus(implementation):
    arguments = token(2, 9)
    arguments[1], arguments[7] = arguments[1].abs(), arguments[7].abs()
    state = torch.zeros(2, 9, 16)
    inputs = {n: t[:, None] if n in ("x", "dt", "B", "C", "z") else t for n, t in zip(NAMES, arguments)}
    y64, _ = oracle.scan(**{n: t.double() for n, t in inputs.items()}, dt_softplus=False)
    y = state_update(state, *arguments, dt_softplus=False, implementation=implementation)
    assert error(y, y64[:, 0]) < TOLERANCE[torch.float32]


@BOTH
def test_layouts(implementation):
    """Slices of wider projections, int32 slots, states in every second slot of a pool."""
    wide = random_like(torch.empty(2, 100))[0]
    A, D, bias = -torch.rand(9, 16), *random_like(torch.empty(9), torch.empty(9))
    arguments = [wide[:, :9], wide[:, 9:18], A, wide[:, 20:36], wide[:, 36:52], D, wide[:, 60:69], bias]
    (pool,) = random_like(torch.empty(8, 9, 16))
    expected = pool[::2].clone()
    y_expected = state_update(
        expected, *(t.contiguous() for t in arguments), slots=torch.tensor([3, 1]), implementation=implementation
    )
    slots = torch.tensor([3, 1], dtype=torch.int32)
    y = state_update(pool[::2], *arguments, slots=slots, implementation=implementation)
    assert torch.equal(y, y_expected)
    assert torch.equal(pool[::2], expected)


@EVERY_FORM
@pytest.mark.parametrize("window_dtype", [torch.float32, torch.bfloat16])
def test_conv_slots(implementation, dtype, window_dtype, poisoned):
    x, state, weight, bias = random_like(
        torch.empty(3, 21, dtype=dtype), torch.empty(6, 3, 21, dtype=window_dtype), torch.empty(21, 4), torch.empty(21)
    )
    slots = torch.tensor([4, 0, 3])
    before = state.clone()
    y64, _ = oracle.conv(x.double()[:, None], weight.double(), bias.double(), "silu", before[slots].double())
    y = conv_update(state, x, weight, bias, activation="silu", slots=slots, implementation=implementation)
    assert y.dtype == dtype
    assert error(y, y64[:, 0]) < max(TOLERANCE[dtype], TOLERANCE[torch.float32])
    assert torch.equal(state[slots, :2], before[slots, 1:])
    assert torch.equal(state[slots, 2], x.to(window_dtype))
    assert torch.equal(state[[1, 2, 5]], before[[1, 2, 5]])


@BOTH
def test_empty_batch(implementation):
    state = torch.ones(2, 5, 16)
    y = state_update(state, *token(0, 5), slots=torch.zeros(0, dtype=torch.long), implementation=implementation)
    assert y.shape == (0, 5)
    assert (state == 1).all()


@BOTH
def test_torch_library(implementation):
    arguments = token(2, 5)
    slots = torch.tensor([2, 0])
    torch.library.opcheck(_update, (torch.zeros(3, 5, 16), *arguments, True, slots, implementation))
    window, weight, bias = torch.zeros(3, 3, 5), torch.randn(5, 4), torch.randn(5)
    torch.library.opcheck(_conv_update, (window, arguments[0], weight, bias, "silu", slots, implementation))


@BOTH
def test_compiled_equals_eager(implementation):
    arguments = token(2, 5)
    weight, bias = random_like(torch.empty(5, 4), torch.empty(5))

    def step(state, window, x):
        x = conv_update(window, x, weight, bias, activation="silu", implementation=implementation)
        return state_update(state, x, *arguments[1:], implementation=implementation)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        state, window = random_like(torch.empty(2, 5, 16), torch.empty(2, 3, 5))
        with torch.inference_mode():
            y = [function(state, window, arguments[0]) for _ in range(2)][-1]
        results.append((y, state, window))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results))


def test_bad_arguments():
    arguments = token(2, 5)
    with pytest.raises(ValueError, match=r"state has shape \(3, 5, 16\), expected \(2, 5, 16\)"):
        state_update(torch.zeros(3, 5, 16), *arguments)
    with pytest.raises(ValueError, match=r"slots has shape \(1,\), expected \(2,\)"):
        state_update(torch.zeros(3, 5, 16), *arguments, slots=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"dt has shape \(2, 4\), expected \(2, 5\)"):
        state_update(torch.zeros(2, 5, 16), arguments[0], arguments[1][:, :4], *arguments[2:])
    with pytest.raises(ValueError, match="no gradient"):
        state_update(torch.zeros(2, 5, 16), arguments[0].requires_grad_(), *arguments[1:])
    with pytest.raises(ValueError, match=r"weight has shape \(4, 4\), expected \(5, 4\)"):
        conv_update(torch.zeros(2, 3, 5), torch.zeros(2, 5), torch.zeros(4, 4))


@BOTH
def test_slots_that_do_not_exist(implementation):
    """They must not reach memory that is not ours."""
    for slots in ([0, 3], [-4, 0]):
        with pytest.raises((ValueError, IndexError), match=r"[34]"):
            state_update(torch.zeros(3, 5, 16), *token(2, 5), slots=torch.tensor(slots), implementation=implementation)


def test_a_prompt_then_tokens():
    """Scan and convolution over a right-padded batch leave the states that one-token updates continue from."""
    inputs = {name: tensor.detach() for name, tensor in scan_inputs(2, 12, 6).items()}
    x, weight, bias = inputs["x"], *random_like(torch.empty(6, 4), torch.empty(6))
    whole = ops.causal_conv1d(x, weight, bias, activation="silu")[0]
    rest = [inputs[name] for name in NAMES[1:]]
    y_whole, _ = ops.selective_scan(whole, *rest)
    lengths, seq_idx = [9, 5], packed([(0, 9), (-1, 3)], [(0, 5), (-1, 7)])
    out, window = ops.causal_conv1d(x, weight, bias, activation="silu", seq_idx=seq_idx, return_final_state=True)
    _, state = ops.selective_scan(out, *rest, seq_idx=seq_idx, return_final_state=True)
    for row, length in enumerate(lengths):
        slots = torch.tensor([row])
        for t in range(length, 12):
            now = ops.conv_update(window, x[row, t][None], weight, bias, activation="silu", slots=slots)
            step = [v[row, t][None] if n in ("dt", "B", "C", "z") else v for n, v in zip(NAMES[1:], rest)]
            y = ops.state_update(state, now, *step, slots=slots)
            assert error(y[0], y_whole[row, t]) < TOLERANCE[torch.float32]
