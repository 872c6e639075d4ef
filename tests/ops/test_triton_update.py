"""The Triton one-token updates, in place on slots, against the float64 loops of a sequence."""

from __future__ import annotations

import oracle
import pytest
import torch
from interpreter import DEVICE
from oracle import error
from test_triton_conv import inputs as conv_inputs
from test_triton_scan import inputs as scan_inputs

from vlmamba.ops.state_update import triton as update

pytestmark = pytest.mark.usefixtures("poisoned")


def test_tokens_one_by_one_are_the_scan():
    t = scan_inputs(3, 5, 70, 16)
    slots = torch.tensor([4, 0, 2], device=DEVICE)
    pool = torch.full((6, 70, 16), 7.0, device=DEVICE)
    pool[slots] = t["initial"]
    rows = [
        update.forward(
            pool,
            t["x"][:, i],
            t["dt"][:, i],
            t["A"],
            t["B"][:, i],
            t["C"][:, i],
            t["D"],
            t["z"][:, i],
            t["dt_bias"],
            True,
            slots,
        )
        for i in range(5)
    ]
    y64, final64 = oracle.scan(**{name: value.double().cpu() for name, value in t.items()})
    assert error(torch.stack(rows, 1), y64) < 1e-6
    assert error(pool[slots], final64) < 1e-6
    assert (pool[[1, 3, 5]] == 7).all()


def test_without_slots_or_extras():
    t = scan_inputs(2, 1, 33, 8)
    state = t["initial"].clone()
    dt = t["dt"].abs() * 0.1
    y = update.forward(state, t["x"][:, 0], dt[:, 0], t["A"], t["B"][:, 0], t["C"][:, 0], None, None, None, False, None)
    exact = {name: t[name].double().cpu() for name in ("x", "A", "B", "C", "initial")}
    y64, final64 = oracle.scan(**exact, dt=dt.double().cpu(), dt_softplus=False)
    assert error(y[:, None], y64) < 1e-6
    assert error(state, final64) < 1e-6


@pytest.mark.parametrize(
    ("W", "dtype"), [(4, torch.float32), (4, torch.bfloat16), (2, torch.float32), (1, torch.float32)]
)
def test_inputs_one_by_one_are_the_convolution(W, dtype):
    t = conv_inputs(2, 6, 40, W, dtype)
    slots = torch.tensor([3, 1], device=DEVICE, dtype=torch.int32)
    pool = torch.full((4, W - 1, 40), 7.0, device=DEVICE, dtype=dtype)
    pool[slots.long()] = t["initial"]
    rows = [update.conv_forward(pool, t["x"][:, i], t["weight"], t["bias"], "silu", slots) for i in range(6)]
    y64, final64 = oracle.conv(**{name: value.double().cpu() for name, value in t.items()}, activation="silu")
    assert error(torch.stack(rows, 1), y64) < (1e-6 if dtype == torch.float32 else 8e-3)
    assert torch.equal(pool[slots.long()].double().cpu(), final64)
    assert (pool[[0, 2]] == 7).all()


def test_clear_errors():
    t = scan_inputs(1, 1, 8, 16)
    row = [t[name][:, 0] for name in ("x", "dt")] + [t["A"]] + [t[name][:, 0] for name in ("B", "C")]
    with pytest.raises(ValueError, match=r"state is torch\.bfloat16"):
        update.forward(t["initial"].bfloat16(), *row, None, None, None, True, None)
    with pytest.raises(ValueError, match="slots holds"):
        update.forward(t["initial"], *row, None, None, None, True, torch.zeros(1, device=DEVICE))
