"""The decoding kernels against plain torch in float64: odd sizes, few and many rows, poisoned buffers."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from interpreter import DEVICE

from vlmamba.ops import decode
from vlmamba.ops.decode import Buffers, Head, Layer, Matrix, Plan, quantise

d, D, N, R, W, V = 24, 40, 8, 5, 4, 67
SMALL = Plan(vector_block=16, vector_bytes=1024, matrix_block=16, mix_block=16, recur_channels=16)


def weights(dtype: torch.dtype = torch.float32, layers: int = 2, seed: int = 0) -> tuple[list[Layer], Head]:
    """Random weights, with A, D, dt as a trained model has them."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> torch.Tensor:
        return (torch.randn(shape, generator=make) * scale).to(DEVICE, kind)

    def layer() -> Layer:
        return Layer(
            norm=1 + normal(d, scale=0.2),
            eps=1e-5,
            in_proj=Matrix(normal(2 * D, d, scale=d**-0.5)),
            conv_weight=normal(D, W, scale=0.5),
            conv_bias=normal(D, scale=0.2),
            x_proj=normal(R + 2 * N, D, scale=D**-0.5),
            dt_proj=normal(D, R, scale=R**-0.5),
            dt_bias=normal(D, kind=torch.float32) - 3,
            A=-torch.exp(normal(D, N, kind=torch.float32)),
            D=normal(D, kind=torch.float32),
            out_proj=Matrix(normal(d, D, scale=D**-0.5)),
        )

    head = Head(normal(V, d), 1 + normal(d, scale=0.2), 1e-5, Matrix(normal(V, d, scale=d**-0.5)))
    return [layer() for _ in range(layers)], head


def wide(layers: list[Layer], head: Head) -> tuple[list[Layer], Head]:
    """The same weights in float64, on the CPU, int8 ones multiplied out."""

    def exact(value: object) -> object:
        if isinstance(value, Matrix):
            scale = 1 if value.scale is None else value.scale.double().cpu()[:, None]
            return Matrix(value.weight.double().cpu() * scale)
        return value.double().cpu() if isinstance(value, torch.Tensor) else value

    def whole(part):
        return replace(part, **{f.name: exact(getattr(part, f.name)) for f in fields(part)})

    return [whole(layer) for layer in layers], whole(head)


def run(
    layers: list[Layer], head: Head, batch: int, plan: Plan, name: str, steps: int = 3
) -> tuple[torch.Tensor, list[torch.Tensor], Buffers]:
    """Logits after some steps over given tokens, and the states, on slots in disorder of a pool with room to spare."""
    make = torch.Generator().manual_seed(1)
    device, dtype = head.embedding.device, head.embedding.dtype
    exact = torch.promote_types(dtype, torch.float32)
    buffers = Buffers.make(batch, layers[0], head, plan)
    buffers.limits.copy_(torch.tensor([V - 3, 7]))
    if dtype == torch.float64:
        all_buffers = {f.name: getattr(buffers, f.name) for f in fields(buffers)}
        buffers = replace(buffers, **{name: b.double() for name, b in all_buffers.items() if b.is_floating_point()})
    buffers.slots.copy_(torch.randperm(batch + 2, generator=make)[:batch])
    conv = [torch.randn(batch + 2, W - 1, D, generator=make).to(device, torch.bfloat16).to(dtype) for _ in layers]
    ssm = [torch.randn(batch + 2, D, N, generator=make).to(device, exact) for _ in layers]
    logits = []
    for _ in range(steps):
        buffers.tokens.copy_(torch.randint(V, (batch,), generator=make))
        for scratch in ("logits", "hidden", "normed", "delta", "xz", "x", "partial", "features", "dt", "y", "best"):
            getattr(buffers, scratch).fill_(float("nan"))
        decode.step(layers, head, conv, ssm, buffers, plan, name)
        logits.append(buffers.logits.clone())
    return torch.stack(logits), conv + ssm, buffers


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got = got.double().cpu()
    return float((got - expected).norm() / expected.norm())


PLANS = {
    "fused": (1, SMALL),
    "fused, two": (2, SMALL),
    "one thing at a time": (3, SMALL),
    "one thing at a time, more than a block": (17, replace(SMALL, recur_sequences=2)),
}


@pytest.mark.parametrize(("batch", "plan"), PLANS.values(), ids=PLANS)
def test_step_is_the_reference_in_float64(batch: int, plan: Plan) -> None:
    layers, head = weights()
    logits, states, _ = run(layers, head, batch, plan, "triton")
    logits64, states64, _ = run(*wide(layers, head), batch, plan, "reference")
    assert error(logits, logits64) < 2e-6
    for state, state64 in zip(states, states64):
        assert error(state, state64) < 2e-6


@pytest.mark.parametrize("batch", [1, 3])
def test_int8_weights_are_multiplied_out_exactly(batch: int) -> None:
    layers, head = weights()
    layers = [replace(x, in_proj=quantise(x.in_proj.weight), out_proj=quantise(x.out_proj.weight)) for x in layers]
    head = replace(head, matrix=quantise(head.matrix.weight))
    logits, _, _ = run(layers, head, batch, SMALL, "triton")
    logits64, _, _ = run(*wide(layers, head), batch, SMALL, "reference")
    assert error(logits, logits64) < 2e-6


def test_bf16_is_as_close_as_bf16_can_be() -> None:
    layers, head = weights(torch.bfloat16)
    logits, _, _ = run(layers, head, 1, SMALL, "triton")
    logits64, _, _ = run(*wide(layers, head), 1, SMALL, "reference")
    assert error(logits, logits64) < 1e-2


def test_quantise_rounds_to_half_a_step() -> None:
    weight = torch.randn(9, 30, generator=torch.Generator().manual_seed(2))
    matrix = quantise(weight)
    assert matrix.scale is not None
    assert ((matrix.weight * matrix.scale[:, None] - weight).abs() <= matrix.scale[:, None] * 0.5001).all()
    assert (matrix.weight.abs().amax(1) == 127).all()


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_tokens_are_chosen_fed_back_and_remembered(name: str) -> None:
    layers, head = weights()
    _, _, buffers = run(layers, head, 3, SMALL, name, steps=1)
    allowed = buffers.logits[:, : V - 3].clone()
    allowed[:, 7] = -torch.inf
    assert torch.equal(buffers.tokens, allowed.argmax(-1))
    assert torch.equal(buffers.history[:, 0], buffers.tokens)
    assert buffers.count.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_drawn_tokens_follow_the_softmax(name: str) -> None:
    """250 draws from four tokens at temperature 2: within four standard errors of softmax(logits / 2)."""
    form = decode._form(torch.device(DEVICE), name)
    logits = torch.tensor([[0.0, 2.0, 1.0, 9.0, 9.0]], device=DEVICE).repeat(250, 1)
    seed, count = torch.arange(250, device=DEVICE), torch.zeros(250, dtype=torch.int32, device=DEVICE)
    tokens, history = torch.zeros_like(seed), torch.zeros(250, 2, dtype=torch.int64, device=DEVICE)
    stops, slots = torch.tensor([1, -1], device=DEVICE), torch.arange(250, dtype=torch.int32, device=DEVICE)
    heat, limits = torch.full((250,), 2.0, device=DEVICE), torch.tensor([4, 3], device=DEVICE)
    parts = torch.zeros(250, 1, device=DEVICE), torch.zeros(250, 1, dtype=torch.int32, device=DEVICE)
    form.choose(logits, heat, seed, stops, limits, count, history, tokens, slots, *parts, 999, SMALL)
    assert torch.equal(slots == 999, tokens == 1)
    p = torch.softmax(torch.tensor([0.0, 1.0, 0.5]), 0)
    drawn = torch.bincount(tokens.cpu(), minlength=3) / 250
    assert (drawn - p).abs().max() < 4 * 0.5 / 250**0.5
