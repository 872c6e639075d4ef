"""Which implementation runs, what is said about it, and the native code's hosts and threads."""

from __future__ import annotations

import os
import subprocess
import sys

import oracle
import pytest
import torch
from forms import in_float64, packed, random_like, scan_inputs
from oracle import error

from vlmamba import ops
from vlmamba.ops import dispatch, native
from vlmamba.ops.causal_conv1d import cpu as conv_cpu
from vlmamba.ops.selective_scan import cpu as scan_cpu
from vlmamba.ops.state_update import cpu as update_cpu

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(native.refusal() is not None, reason=str(native.refusal()))


def test_choice_by_input(monkeypatch):
    monkeypatch.delenv("VLMAMBA_OPS", raising=False)
    assert dispatch.choose("selective_scan", CPU, torch.float32) == "cpu"
    assert dispatch.choose("selective_scan", CPU, torch.bfloat16) == "cpu"
    assert dispatch.choose("selective_scan", CPU, torch.float64) == "reference"
    assert dispatch.choose("selective_scan", torch.device("mps"), torch.float32) == "reference"


def test_precedence(monkeypatch):
    """Argument over block over environment over the input."""
    monkeypatch.setenv("VLMAMBA_OPS", "reference")
    assert dispatch.choose("scan_2d", CPU, torch.float32) == "reference"
    assert "set by VLMAMBA_OPS" in ops.explain("scan_2d", "cpu", torch.float32)
    with ops.use_implementation("cpu"):
        assert dispatch.choose("scan_2d", CPU, torch.float32) == "cpu"
        assert dispatch.choose("scan_2d", CPU, torch.float32, "reference") == "reference"
        with ops.use_implementation("reference"):
            assert dispatch.choose("scan_2d", CPU, torch.float32) == "reference"
        assert "set by use_implementation" in ops.explain("scan_2d", "cpu", torch.float32)
    assert dispatch.choose("scan_2d", CPU, torch.float32) == "reference"


def test_refusals(monkeypatch):
    monkeypatch.delenv("VLMAMBA_OPS", raising=False)
    with pytest.raises(ValueError, match=r"'cpu' cannot run on cpu torch\.float64: float64"):
        dispatch.choose("selective_scan", CPU, torch.float64, "cpu")
    with pytest.raises(ValueError, match="'cpu' cannot run on cuda"):
        dispatch.choose("selective_scan", torch.device("cuda"), torch.float32, "cpu")
    with pytest.raises(ValueError, match="unknown implementation 'metal'"), ops.use_implementation("metal"):
        pass
    monkeypatch.setenv("VLMAMBA_OPS", "metal")
    with pytest.raises(ValueError, match="VLMAMBA_OPS: unknown implementation 'metal'"):
        dispatch.choose("selective_scan", CPU, torch.float32)


def test_explanations(monkeypatch):
    monkeypatch.delenv("VLMAMBA_OPS", raising=False)
    assert ops.explain("selective_scan", "cpu", torch.float32).startswith("cpu: native code by llvmlite")
    assert "float64" in ops.explain("causal_conv1d", "cpu", torch.float64)
    assert ops.explain("state_update", "mps", torch.float32).startswith("reference")
    with pytest.raises(ValueError, match="unknown op 'scan'"):
        ops.explain("scan", "cpu", torch.float32)


def test_without_llvmlite():
    """The reference takes over, a warning says so once, and nothing of Linux, Triton or LLVM is imported at start."""
    program = """
import sys, warnings
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("llvmlite", "triton", "resource", "fcntl"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
from vlmamba import ops
x, A, B = torch.randn(1, 5, 4), -torch.rand(4, 16), torch.randn(1, 5, 16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        ops.selective_scan(x, x, A, B, B)
        ops.causal_conv1d(x, A[:, :4])
said = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
assert len(said) == 1 and "llvmlite is not installed" in said[0], said
assert "llvmlite is not installed" in ops.explain("selective_scan", "cpu", torch.float32)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("VLMAMBA_OPS", "TRITON_INTERPRET")}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.fixture(params=[8, 4], ids=["eight-lanes", "four-lanes"])
def other_host(request, monkeypatch):
    """The kernels as they are generated for another processor; any one of ours runs them."""
    caches = (scan_cpu._kernel, conv_cpu._kernel, update_cpu._kernel)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(native, "host", lambda: native.Host("another", request.param, False))
    yield
    for cache in caches:
        cache.cache_clear()


def test_portable_code(other_host):
    """Without AVX-512's instructions for exp2, and with blocks of other widths."""
    inputs = scan_inputs(2, 40, 11)
    seq_idx = packed([(0, 35), (1, 5)], [(0, 20), (-1, 20)])
    given = tuple(inputs[name] for name in NAMES)
    options = {"initial_state": inputs["initial"], "seq_idx": seq_idx, "return_final_state": True}
    y, final = ops.selective_scan(*given, **options, implementation="cpu")
    exact = in_float64(inputs)
    y64, final64 = oracle.scan(**exact, seq_idx=seq_idx)
    assert max(error(y, y64), error(final, final64)) < 2e-6
    (dy,) = random_like(y)
    found = torch.autograd.grad(y, list(inputs.values()), dy)
    for mine, theirs in zip(found, torch.autograd.grad(y64, list(exact.values()), dy.double())):
        assert error(mine, theirs) < 2e-6
    x, weight = inputs["x"].detach(), torch.randn(11, 4)
    mine = ops.causal_conv1d(x, weight, activation="silu", implementation="cpu")[0]
    assert error(mine, oracle.conv(x.double(), weight.double(), activation="silu")[0]) < 2e-6
    state = torch.zeros(2, 11, 16)
    token = [t.detach()[:, 0] if n in ("x", "dt", "B", "C", "z") else t.detach() for n, t in zip(NAMES, given)]
    assert error(ops.state_update(state, *token, implementation="cpu"), oracle_token(token)) < 2e-6


def oracle_token(token):
    inputs = {n: t.double() for n, t in zip(NAMES, token)}
    return oracle.scan(**{n: t[:, None] if n in ("x", "dt", "B", "C", "z") else t for n, t in inputs.items()})[0][:, 0]


def test_threads_change_nothing(monkeypatch):
    """Outputs and input gradients to the bit; dB and dC are sums over the tasks' channels."""
    inputs = scan_inputs(1, 70, 100)
    x, weight = inputs["x"], torch.randn(100, 4)

    def results():
        y, final = ops.selective_scan(
            *(inputs[name] for name in NAMES), initial_state=inputs["initial"], return_final_state=True
        )
        gradients = dict(zip(inputs, torch.autograd.grad(y.sum() + final.sum(), list(inputs.values()))))
        conv = ops.causal_conv1d(x, weight, activation="silu")[0]
        return y, final, gradients, conv, torch.autograd.grad(conv.sum(), x)[0]

    y, final, gradients, conv, dx = results()
    monkeypatch.setattr(native, "threads_for", lambda work: 3)
    y_3, final_3, gradients_3, conv_3, dx_3 = results()
    assert torch.equal(y, y_3)
    assert torch.equal(final, final_3)
    assert torch.equal(conv, conv_3)
    assert torch.equal(dx, dx_3)
    for name in inputs:
        if name in ("B", "C"):
            assert error(gradients[name], gradients_3[name]) < 1e-6
        else:
            assert torch.equal(gradients[name], gradients_3[name]), name


def test_an_error_in_a_thread_is_not_swallowed():
    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        native.run([fail, lambda: None], 2)


def test_size_decides_the_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert native.threads_for(native.SMALL - 1) == 1
    assert native.threads_for(native.SMALL) == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_threads_after_a_fork():
    """A child process gets threads of its own; its parent's do not survive."""
    program = """
import os, signal, torch
from vlmamba.ops import native
native.run([lambda: None, lambda: None], 2)
child = os.fork()
if child == 0:
    signal.alarm(30)
    native.run([lambda: None, lambda: None], 2)
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1] != 0)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_shapes_without_data():
    """On the meta device, as for planning memory, every op gives shapes and dtypes."""
    x, A, B = (torch.empty(size, device="meta") for size in ((2, 6, 4), (4, 16), (2, 6, 16)))
    y, final = ops.selective_scan(x.bfloat16(), x, A, B, B, return_final_state=True)
    assert (y.shape, y.dtype, final.shape, final.dtype) == (x.shape, torch.bfloat16, (2, 4, 16), torch.float32)
    assert ops.causal_conv1d(x, A[:, :4], return_final_state=True)[1].shape == (2, 3, 4)
    assert ops.conv_2d(x, A[:, :4], None, grid=(2, 3), orders=("row", "column")).shape == (2, 2, 6, 4)
    assert ops.state_update(torch.empty(2, 4, 16, device="meta"), x[:, 0], x[:, 0], A, B[:, 0], B[:, 0]).shape == (2, 4)
