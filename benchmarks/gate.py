"""What must hold before anything is timed: every number of a wrong function is worthless.

Each check compares with float64 by the relative error of the whole tensor, on fresh random data.
Shapes: B batch, L length, D channels, N states, P patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import models, peers
from vlmamba import ops
from vlmamba.models.mamba import VLMambaForCausalLM

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1.5e-2}


def run(device: torch.device) -> list[str]:
    """Every check's failure, as a sentence; an empty list is a green gate."""
    torch.manual_seed(0)
    checks: list[Callable[[torch.device], list[str]]] = [scans, convolutions, grids, updates, whole_model]
    if peers.refusal("mamba-ssm") is None and device.type == "cuda":
        checks.append(peer_scan)
    failures: list[str] = []
    for check in checks:
        try:
            failures += check(device)
        except Exception as error:
            failures.append(f"{check.__name__}: {type(error).__name__}: {error}")
    return failures


def relative(value: Tensor, exact: Tensor) -> float:
    value, exact = value.detach().double().cpu(), exact.detach().double().cpu()
    error = ((value - exact).norm() / exact.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def scan_inputs(batch: int, length: int, channels: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """x, dt, A, B, C, D, z, dt bias with the dt of a trained model: 0.001 to 0.1 after the softplus."""
    n = 16

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    dt = torch.empty(channels, device=device).uniform_(-6.9, -2.3).exp()
    bias = dt + torch.log(-torch.expm1(-dt))
    A = -torch.arange(1, n + 1, device=device, dtype=torch.float32).repeat(channels, 1)
    D = torch.randn(channels, device=device)
    return [
        noise(batch, length, channels),
        noise(batch, length, channels) * 0.2,
        A,
        noise(batch, length, n),
        noise(batch, length, n),
        D,
        noise(batch, length, channels),
        bias,
    ]


def _compare(
    name: str, function: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: list[Tensor], tolerance: float
) -> list[str]:
    """Output and every gradient against the same in float64 on the CPU."""
    fast = [t.detach().requires_grad_() for t in inputs]
    wide = [t.detach().double().cpu().requires_grad_() for t in inputs]
    y, y64 = function(*fast), exact(*wide)
    dy = torch.randn_like(y)
    pairs = [("output", y, y64)]
    gradients = zip(torch.autograd.grad(y, fast, dy), torch.autograd.grad(y64, wide, dy.double().cpu()))
    pairs += [(f"gradient {i}", g, g64) for i, (g, g64) in enumerate(gradients)]
    found = [(label, relative(a, b)) for label, a, b in pairs]
    return [f"{name}: {label} off by {error:.2g} > {tolerance}" for label, error in found if not error <= tolerance]


def scans(device: torch.device) -> list[str]:
    failures = []
    for dtype, tolerance in TOLERANCE.items():
        for batch, length, channels in ((2, 67, 80), (1, 300, 48)):
            failures += _compare(
                f"selective_scan {dtype} L{length}",
                lambda *a: ops.selective_scan(*a)[0],
                lambda *a: ops.selective_scan(*a, implementation="reference")[0],
                scan_inputs(batch, length, channels, device, dtype),
                tolerance,
            )
    return failures


def convolutions(device: torch.device) -> list[str]:
    failures = []
    for dtype, tolerance in TOLERANCE.items():
        inputs = [
            torch.randn(2, 67, 80, device=device, dtype=dtype),
            torch.randn(80, 4, device=device, dtype=dtype),
            torch.randn(80, device=device, dtype=dtype),
        ]
        failures += _compare(
            f"causal_conv1d {dtype}",
            lambda *a: ops.causal_conv1d(*a, activation="silu")[0],
            lambda *a: ops.causal_conv1d(*a, activation="silu", implementation="reference")[0],
            inputs,
            tolerance,
        )
    return failures


def grids(device: torch.device) -> list[str]:
    failures = []
    for dtype, tolerance in TOLERANCE.items():
        x, dt, A, _, _, D, _, bias = scan_inputs(2, 15, 48, device, dtype)
        K = len(ops.ORDERS)
        B, C = (torch.randn(2, K, 15, 16, device=device, dtype=dtype) for _ in range(2))
        many = [t[:, None].repeat(1, K, 1, 1) for t in (x, dt)]
        options = {"grid": (3, 5), "orders": ops.ORDERS}
        failures += _compare(
            f"scan_2d {dtype}",
            lambda *a, o=options: ops.scan_2d(*a, **o),
            lambda *a, o=options: ops.scan_2d(*a, **o, implementation="reference"),
            [*many, A, B, C, D, bias],
            tolerance,
        )
    return failures


def updates(device: torch.device) -> list[str]:
    """L updates of one token are one scan."""
    x, dt, A, B, C, D, z, bias = scan_inputs(3, 9, 48, device, torch.float32)
    y, final = ops.selective_scan(x, dt, A, B, C, D, z, bias, return_final_state=True)
    state = torch.zeros_like(final)
    steps = [
        ops.state_update(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, z[:, t], bias) for t in range(x.shape[1])
    ]
    errors = {"outputs": relative(torch.stack(steps, 1), y), "state": relative(state, final)}
    return [f"state_update against selective_scan: {k} off by {e:.2g}" for k, e in errors.items() if not e <= 1e-4]


@torch.no_grad()
def whole_model(device: torch.device) -> list[str]:
    """Our language model against transformers' of the same weights in float64; one token at a time from its state."""
    config = models.mamba_config("toy")
    theirs = models.placed(lambda: peers.plain_mamba().MambaForCausalLM(config), torch.device("cpu"), torch.float64)
    ours = VLMambaForCausalLM(config)
    ours.load_state_dict(renamed(theirs.state_dict()))
    ours = ours.to(device).eval()
    ids = models.tokens("toy", 2, 37, torch.device("cpu"))
    exact = theirs(ids).logits
    prompt = ours(ids[:, :30].to(device), use_cache=True)
    steps, state = [prompt.logits], prompt.cache_params
    for t in range(30, 37):
        steps.append(ours(ids[:, t : t + 1].to(device), cache_params=state, use_cache=True).logits)
    error = relative(torch.cat(steps, 1), exact)
    return [] if error <= 1e-3 else [f"language model: prompt, then single tokens, off by {error:.2g}"]


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names to the run-time names of ours."""
    moved = {"mixer.A_log": "mixer.ssm.A_log", "mixer.D": "mixer.ssm.D", "mixer.dt_proj.bias": "mixer.ssm.dt_bias"}
    out = {}
    for name, value in state.items():
        for old, new in moved.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        out[name] = value
    return out


def peer_scan(device: torch.device) -> list[str]:
    """The peer's scan, as built here: a wrong peer would be as worthless to compare with."""
    from mamba_ssm import selective_scan_fn

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        x, dt, B, C, z = (t.transpose(1, 2).contiguous() for t in (x, dt, B, C, z))
        return selective_scan_fn(x, dt, A, B, C, D, z, bias, delta_softplus=True).transpose(1, 2)

    return _compare(
        "mamba-ssm's scan",
        theirs,
        lambda *a: ops.selective_scan(*a, implementation="reference")[0],
        scan_inputs(2, 67, 80, device, torch.bfloat16),
        3e-2,
    )
