"""One decoding step of a Mamba-1 language model on tensors: from the last tokens to the next ones.

Not differentiable; every buffer is given, so that a step can be captured in a CUDA graph. What runs where:

    B small     per layer: linear (norm and in_proj), extract (convolution and x_proj), advance (the convolution again,
                dt_proj, recurrence, gate), linear (out_proj, added to the residual stream): latency is what counts
    B large     per layer: normalise, in_proj, mix (convolution, x_proj), recur (dt_proj, recurrence, gate), out_proj:
                the bytes of the states are what counts; the large products mostly in torch's library

Legend: B batch, S slots of the state pool, d model width, D channels, N state size, R rank of dt, W taps,
F = R + 2 N features of x_proj, P partial sums, V vocabulary, C parts of it, rows and width of a weight.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from vlmamba.ops import dispatch
from vlmamba.ops.decode.plan import Plan

__all__ = ["HOST_ROWS", "Buffers", "Head", "Layer", "Matrix", "Plan", "quantise", "step"]

HOST_ROWS = 8  # sequences that the native step on the CPU takes at once (`cpu.Token`); with more, torch's products win

VOCABULARY_PART = 2048  # tokens among which one program looks for the best


@dataclass(frozen=True)
class Matrix:
    """weight (rows, width), contiguous; with scale (rows,) float32 where the weight is int8."""

    weight: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """A block's weights: norm (d,); in_proj (2 D, d); conv_weight (D, W), conv_bias (D,); x_proj (F, D); dt_proj
    (D, R); dt_bias (D,), A (D, N), D (D,) float32; out_proj (d, D)."""

    norm: Tensor
    eps: float
    in_proj: Matrix
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    out_proj: Matrix


@dataclass(frozen=True)
class Head:
    """The ends of the model: embedding (V, d), final norm (d,), head (V, d)."""

    embedding: Tensor
    norm: Tensor
    eps: float
    matrix: Matrix


@dataclass(frozen=True)
class Buffers:
    """What a step reads and writes, besides weights and states: all of fixed address.

    Attributes:
        tokens (B,) int64: read at the start of a step and replaced at its end.
        slots (B,) int32: rows of the state pool.
        temperature (B,) float32, 0 for the likeliest token; seed (B,) int64; count (B,) int32: tokens drawn so far;
        history (B, capacity) int64: the last tokens drawn, number n at n % capacity.
        stops (8,) int64: a row that draws one of these has ended (-1: none) and goes on in the spare slot.
        limits (2,) int64: how many tokens of the vocabulary exist, and one that is never drawn (-1: none).
        logits (B, V) float32, or in the dtype of the weights where torch's library computes them.
        hidden (B, d) float32: the residual stream. The rest: scratch.
    """

    tokens: Tensor
    slots: Tensor
    temperature: Tensor
    seed: Tensor
    stops: Tensor
    limits: Tensor
    count: Tensor
    history: Tensor
    logits: Tensor
    hidden: Tensor
    normed: Tensor
    delta: Tensor
    xz: Tensor
    x: Tensor
    partial: Tensor
    features: Tensor
    dt: Tensor
    y: Tensor
    best: Tensor
    where: Tensor

    @classmethod
    def make(cls, batch: int, layer: Layer, head: Head, plan: Plan, capacity: int = 64) -> Buffers:
        device, dtype = head.embedding.device, head.embedding.dtype
        channels, width, features = layer.A.shape[0], len(layer.norm), len(layer.x_proj)
        vocabulary = len(head.matrix.weight)
        parts = -(-vocabulary // VOCABULARY_PART)

        library = batch > plan.vector_up_to and head.matrix.scale is None
        exact = dtype if library else torch.promote_types(dtype, torch.float32)

        def zeros(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        return cls(
            tokens=zeros(batch, kind=torch.int64),
            slots=torch.arange(batch, dtype=torch.int32, device=device),
            temperature=zeros(batch),
            seed=zeros(batch, kind=torch.int64),
            stops=zeros(8, kind=torch.int64) - 1,
            limits=torch.tensor([vocabulary, -1], device=device),
            count=zeros(batch, kind=torch.int32),
            history=zeros(batch, capacity, kind=torch.int64),
            # Rows begin on whole cache lines.
            logits=zeros(batch, -(-vocabulary // 64) * 64, kind=exact)[:, :vocabulary],
            hidden=zeros(batch, width),
            normed=zeros(batch, width, kind=dtype),
            delta=zeros(batch, width, kind=dtype),
            xz=zeros(batch, 2 * channels, kind=dtype),
            x=zeros(batch, channels, kind=dtype),
            partial=zeros(plan.parts(channels) if batch > plan.vector_up_to else 0, batch, features),
            features=zeros(batch, features),
            dt=zeros(batch, channels),
            y=zeros(batch, channels, kind=dtype),
            best=zeros(batch, parts),
            where=zeros(batch, parts, kind=torch.int32),
        )


def step(
    layers: Sequence[Layer], head: Head, conv: Sequence[Tensor], ssm: Sequence[Tensor], buffers: Buffers, plan: Plan,
    implementation: str | None = None,
) -> None:  # fmt: skip
    """One token for every row of `buffers.tokens`: states move on, logits and next tokens are left in the buffers.

    Args:
        conv, ssm: per layer, the state pools (S, W-1, D) in the dtype of the weights and (S, D, N) float32. The last
            slot is spare: rows without a sequence point at it.
        implementation: "triton" or "reference"; by device if not given.
    """
    form = _form(buffers.hidden.device, implementation)
    form.embed(buffers.tokens, head.embedding, buffers.hidden, plan)
    if len(buffers.tokens) <= plan.vector_up_to:
        _fused_layers(form, layers, head, conv, ssm, buffers, plan)
    else:
        _layers(form, layers, head, conv, ssm, buffers, plan)
    form.choose(
        buffers.logits, buffers.temperature, buffers.seed, buffers.stops, buffers.limits, buffers.count,
        buffers.history, buffers.tokens, buffers.slots, buffers.best, buffers.where, len(ssm[0]) - 1, plan,
    )  # fmt: skip


def _fused_layers(
    form: ModuleType, layers: Sequence[Layer], head: Head, conv: Sequence[Tensor], ssm: Sequence[Tensor],
    buffers: Buffers, plan: Plan,
) -> None:  # fmt: skip
    """From the residual stream to the logits: norms, sums and the convolution inside other kernels."""
    for layer, conv_state, ssm_state in zip(layers, conv, ssm, strict=True):
        into, out = layer.in_proj, layer.out_proj
        convolution = (buffers.slots, layer.conv_weight, layer.conv_bias)
        form.linear(buffers.hidden, into.weight, into.scale, buffers.xz, layer.norm, layer.eps, False, plan)
        form.extract(buffers.xz, conv_state, *convolution, layer.x_proj, buffers.features, plan)
        form.advance(
            buffers.features, buffers.xz, conv_state, ssm_state, *convolution, layer.dt_proj, layer.dt_bias, layer.A,
            layer.D, buffers.y, plan,
        )  # fmt: skip
        form.linear(buffers.y, out.weight, out.scale, buffers.hidden, None, 0.0, True, plan)
    last = head.matrix
    form.linear(buffers.hidden, last.weight, last.scale, buffers.logits, head.norm, head.eps, False, plan)


def _layers(
    form: ModuleType, layers: Sequence[Layer], head: Head, conv: Sequence[Tensor], ssm: Sequence[Tensor],
    buffers: Buffers, plan: Plan,
) -> None:  # fmt: skip
    """The same, one thing at a time."""
    pending = None  # a part of the residual stream not yet added to it
    for layer, conv_state, ssm_state in zip(layers, conv, ssm, strict=True):
        form.normalise(buffers.hidden, pending, layer.norm, layer.eps, buffers.normed, plan)
        _multiply(form, buffers.normed, layer.in_proj, buffers.xz, plan)
        form.mix(
            buffers.xz, conv_state, buffers.slots, layer.conv_weight, layer.conv_bias, layer.x_proj, buffers.x,
            buffers.partial, buffers.features, plan,
        )  # fmt: skip
        form.recur(
            buffers.features, buffers.xz, buffers.x, buffers.dt, ssm_state, buffers.slots, layer.dt_proj,
            layer.dt_bias, layer.A, layer.D, buffers.y, plan,
        )  # fmt: skip
        _multiply(form, buffers.y, layer.out_proj, buffers.delta, plan)
        pending = buffers.delta
    form.normalise(buffers.hidden, pending, head.norm, head.eps, buffers.normed, plan)
    _multiply(form, buffers.normed, head.matrix, buffers.logits, plan)


def _multiply(form: ModuleType, x: Tensor, matrix: Matrix, out: Tensor, plan: Plan) -> None:
    """out = x @ matrix^T, in torch's library unless the matrix is int8."""
    if matrix.scale is None:
        torch.mm(x, matrix.weight.t(), out=out)
    else:
        form.linear(x, matrix.weight, matrix.scale, out, None, 0.0, False, plan)


def quantise(weight: Tensor) -> Matrix:
    """The weight (rows, width) in int8 with one symmetric scale per row: the largest entry becomes 127."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
    return Matrix(torch.round(weight.float() / scale[:, None]).to(torch.int8), scale)


def _form(device: torch.device, implementation: str | None) -> ModuleType:
    """The kernels on CUDA tensors (or interpreted, where TRITON_INTERPRET=1 and asked for), else plain torch."""
    name = implementation or ("triton" if device.type == "cuda" else "reference")
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"decode: the kernels take CUDA tensors, got {device.type}")
    return dispatch.module("decode", name)
