"""Scans over a grid of patches: every order against its definition, gradients, the short form, errors."""

from __future__ import annotations

import oracle
import pytest
import torch
from forms import BOTH, EVERY_FORM, TOLERANCE, random_like, scan_inputs
from oracle import error

from vlmamba import ops
from vlmamba.ops.scan_2d import ORDERS, _conv, _scan, conv_2d, scan_2d
from vlmamba.ops.scan_2d.reference import walk

GRIDS = [(1, 1), (1, 7), (5, 1), (3, 4), (6, 6)]


def grid_inputs(B, K, P, D, N=16, dtype=torch.float32):
    """x, dt, A, B, C, D, dt_bias of K orders, weights for each."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x, dt, B_, C = random_like(
        *(torch.empty(B, K, P, size, dtype=dtype) for size in (D, D, N, N)),
    )
    D_, bias = random_like(torch.empty(K, D, dtype=exact), torch.empty(K, D, dtype=exact), seed=2)
    A = -(0.1 + random_like(torch.empty(K, D, N, dtype=exact), seed=3)[0].abs())
    return [tensor.requires_grad_() for tensor in (x, dt, A, B_, C, D_, bias)]


def in_float64(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize(("h", "w"), GRIDS)
def test_walks(h, w):
    """Each order visits every patch once, so going along it and coming back is the identity."""
    patches = torch.arange(h * w).view(h, w)
    expected = [patches.flatten(), patches.flatten().flip(0), patches.t().flatten(), patches.t().flatten().flip(0)]
    for order, path in enumerate(expected):
        assert torch.equal(walk(order, h, w), path)
        assert torch.equal(walk(order, h, w).sort().values, patches.flatten())
        back = torch.empty_like(path)
        back[path] = path
        assert torch.equal(back, patches.flatten())


@BOTH
@pytest.mark.parametrize("grid", GRIDS)
def test_fold_after_unfold_is_the_identity(implementation, grid):
    """A convolution that only copies its input gives every order the patches in their own places."""
    P = grid[0] * grid[1]
    (x,) = random_like(torch.empty(2, P, 5))
    copying = torch.tensor([0.0, 0, 0, 1]).expand(5, 4)
    y = conv_2d(x, copying, None, grid=grid, orders=ORDERS, implementation=implementation)
    assert torch.equal(y, x[:, None].expand(-1, 4, -1, -1))


@EVERY_FORM
@pytest.mark.parametrize("grid", GRIDS)
def test_scan_and_its_gradients(implementation, dtype, grid, poisoned):
    inputs = grid_inputs(2, 4, grid[0] * grid[1], 9, dtype=dtype)
    y = scan_2d(*inputs, grid=grid, orders=ORDERS, implementation=implementation)
    exact = in_float64(inputs)
    y64 = oracle.scan_2d(*exact, *grid, range(4))
    assert y.dtype == dtype
    assert error(y, y64) < TOLERANCE[dtype]
    (dy,) = random_like(y)
    found = torch.autograd.grad(y, inputs, dy)
    for mine, theirs in zip(found, torch.autograd.grad(y64, exact, dy.double())):
        assert error(mine, theirs) < TOLERANCE[dtype]


@EVERY_FORM
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution_and_its_gradients(implementation, dtype, activation, poisoned):
    exact_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    (x,) = random_like(torch.empty(2, 12, 9, dtype=dtype))
    weight, bias = random_like(torch.empty(4, 9, 4, dtype=exact_dtype), torch.empty(4, 9, dtype=exact_dtype), seed=2)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = conv_2d(*inputs, grid=(3, 4), orders=ORDERS, activation=activation, implementation=implementation)
    exact = in_float64(inputs)
    y64 = oracle.conv_2d(*exact, 3, 4, range(4), activation)
    assert error(y, y64) < TOLERANCE[dtype]
    (dy,) = random_like(y)
    found = torch.autograd.grad(y, inputs, dy)
    for mine, theirs in zip(found, torch.autograd.grad(y64, exact, dy.double())):
        assert error(mine, theirs) < TOLERANCE[dtype]


@BOTH
@pytest.mark.parametrize("orders", [("row",), ("row", "row-reverse"), ("column", "row", "column-reverse")])
def test_shared_weights_equal_one_layer_run_once_per_order(implementation, orders):
    """The short form: shared (D, ...) parameters = the same parameters given to every order = 1-D scans, summed."""
    K, grid = len(orders), (3, 4)
    x, dt, A, B, C, D, bias = grid_inputs(2, K, 12, 7)
    shared = [parameter[0].detach().requires_grad_() for parameter in (A, D, bias)]
    options = {"grid": grid, "orders": orders, "implementation": implementation}
    y = scan_2d(x, dt, shared[0], B, C, shared[1], shared[2], **options)
    spread = [parameter.expand(K, *parameter.shape) for parameter in shared]
    y_spread = scan_2d(x, dt, spread[0], B, C, spread[1], spread[2], **options)
    total = torch.zeros_like(y)
    for k, order in enumerate(orders):
        path = walk(ORDERS.index(order), *grid)
        row = ops.selective_scan(
            x[:, k, path], dt[:, k, path], shared[0], B[:, k, path], C[:, k, path], shared[1], None, shared[2],
            implementation=implementation,
        )[0]  # fmt: skip
        total = total.index_add(1, path, row)
    assert torch.equal(y, y_spread)
    assert error(y, total) < 1e-6
    (dy,) = random_like(y)
    for mine, theirs in zip(torch.autograd.grad(y, shared, dy), torch.autograd.grad(total, shared, dy)):
        assert error(mine, theirs) < 2e-6


@BOTH
def test_without_skip_and_bias(implementation):
    x, dt, A, B, C, _, _ = grid_inputs(1, 2, 6, 5)
    zero = torch.zeros(2, 5)
    options = {"grid": (2, 3), "orders": ("row", "column"), "implementation": implementation}
    absent = scan_2d(x, dt, A, B, C, None, None, **options)
    assert torch.equal(absent, scan_2d(x, dt, A, B, C, zero, zero, **options))
    weight = random_like(torch.empty(5, 4))[0]
    plain = conv_2d(x[:, 0], weight, None, **options)
    assert torch.equal(plain, conv_2d(x[:, 0], weight, torch.zeros(5), **options))


@BOTH
def test_empty_batch(implementation):
    inputs = grid_inputs(0, 2, 6, 5)
    y = scan_2d(*inputs, grid=(2, 3), orders=("row", "column"), implementation=implementation)
    assert y.shape == (0, 6, 5)
    assert all((g == 0).all() for g in torch.autograd.grad(y.sum(), inputs))


@BOTH
def test_torch_library(implementation):
    x, dt, A, B, C, D, bias = grid_inputs(1, 2, 6, 5)
    torch.library.opcheck(_scan, (x, dt, A, B, C, D, bias, True, 2, 3, [0, 3], implementation))
    weight = random_like(torch.empty(2, 5, 4))[0].requires_grad_()
    torch.library.opcheck(_conv, (x[:, 0].detach(), weight, bias, "silu", 2, 3, [0, 3], implementation))


@BOTH
def test_compiled_equals_eager(implementation):
    options = {"grid": (2, 3), "orders": ("row", "column-reverse"), "implementation": implementation}

    def layer(x, dt, A, B, C, D, bias, weight):
        x = x + conv_2d(x[:, 0], weight, bias, activation="silu", **options)
        return scan_2d(x, dt, A, B, C, D, bias, **options)

    inputs = [*grid_inputs(1, 2, 6, 5), random_like(torch.empty(5, 4))[0].requires_grad_()]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [function(*inputs) for function in (layer, compiled)]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(y.sum(), inputs) for y in results]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients))


def test_bad_arguments():
    x, dt, A, B, C, D, bias = grid_inputs(1, 2, 6, 5)
    with pytest.raises(ValueError, match=r"a grid of 2 x 4 has 8 patches, the input has 6"):
        scan_2d(x, dt, A, B, C, D, bias, grid=(2, 4), orders=("row", "column"))
    with pytest.raises(ValueError, match=r"unknown orders \['diagonal'\]"):
        scan_2d(x, dt, A, B, C, D, bias, grid=(2, 3), orders=("row", "diagonal"))
    with pytest.raises(ValueError, match=r"holds 2 orders, but 1 are named"):
        scan_2d(x, dt, A, B, C, D, bias, grid=(2, 3), orders=("row",))
    with pytest.raises(ValueError, match=r"A has shape \(3, 5, 16\), expected"):
        scan_2d(x, dt, A[:1].expand(3, -1, -1), B, C, D, bias, grid=(2, 3), orders=("row", "column"))
    with pytest.raises(ValueError, match=r"weight has shape \(4, 4\), expected \(5, 4\) or \(1, 5, 4\)"):
        conv_2d(x[:, 0], torch.zeros(4, 4), None, grid=(2, 3), orders=("row",))


def test_one_order_is_the_plain_scan():
    inputs = scan_inputs(2, 12, 5)
    names = ("x", "dt", "A", "B", "C", "D")
    x, dt, A, B, C, D = (inputs[name] for name in names)
    y = scan_2d(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, None, grid=(3, 4), orders=("row",))
    assert torch.equal(y, ops.selective_scan(x, dt, A, B, C, D)[0])
