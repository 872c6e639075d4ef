"""What a run will take, before anything loads: parameters and rates of each part, memory, arithmetic, time.

Bytes are counted tensor by tensor as autograd keeps them. Legend: d model width, D channels, N states, R rank of dt,
K scan orders, V vocabulary, P tokens of an image, b bytes of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmamba.data.scenes import FIELDS
from vlmamba.models.connector import VSS
from vlmamba.training.build import Model
from vlmamba.training.config import PARTS, RunConfig
from vlmamba.training.contrastive import MOST, ContrastivePairs
from vlmamba.training.lora import add_adapters
from vlmamba.training.optimizer import freeze, parameter_groups, part_of
from vlmamba.training.outline import outline
from vlmamba.training.patches import PatchReader

_COUNTS = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}
"""Samples of LLaVA's files, for a plan made where they are not."""
_TEXT = {"plain": 40, "v1": 280}
"""Tokens beside the image that a sample of LLaVA's files has on average; of other data a guess."""
_SAVED_EVERY = {"cuda": 32, "cpu": 16}  # steps between two states that the scan keeps
_LOSS_CHUNK = 4096
_GPU_RATE, _SHARE = 750e12, {"cuda": 0.4, "cpu": 0.25}
"""bf16 products of an H100 or H200, FLOP/s, and the share of the product rate that training is taken to reach."""


@dataclass(frozen=True)
class Part:
    """Parameters of a part, how many of them learn, and at what rate."""

    name: str
    parameters: int
    trained: int
    lr: float

    def line(self) -> str:
        of = "" if self.trained == self.parameters else f" for {self.trained / 1e6:.2f}M of them"
        state = f"learning rate {self.lr:g}{of}" if self.trained else "frozen"
        return f"{self.name}: {self.parameters / 1e6:.2f}M parameters, {state}"


@dataclass(frozen=True)
class Estimate:
    """A plan in numbers, for one process of `world`.

    Attributes:
        rows, length: of a micro-batch as it is usually, padding included; images: in it.
        steps: optimiser steps; None if the number of samples cannot be known here.
        memory: bytes at the peak by what they are for, "peak" being their sum; longest: the peak if every row were as
            long as is allowed.
        flops: of a step, over all processes.
    """

    parts: list[Part]
    rows: int
    length: int
    images: int
    steps: int | None
    memory: dict[str, float]
    longest: float
    flops: float

    def lines(self, device: str, rate: float, world: int) -> Iterator[str]:
        """For people to read; `rate` in FLOP/s of one device."""
        yield from (part.line() for part in self.parts)
        yield f"micro-batch: {self.rows} rows of about {self.length} tokens, {self.images} images"
        pieces = ", ".join(f"{name} {_gb(size)}" for name, size in self.memory.items() if name != "peak")
        yield f"memory: about {_gb(self.memory['peak'])} at the peak ({pieces}); {_gb(self.longest)} with longest rows"
        seconds = self.flops / (rate * world * _SHARE[device])
        what = f"{self.flops / 1e12:,.2f} TFLOP a step: about {_clock(seconds)} on {world} x {rate / 1e12:.2f} TFLOP/s"
        yield what if self.steps is None else f"{what}, {self.steps:,} steps, {_clock(seconds * self.steps)} in all"


def estimate(
    config: RunConfig, device: str, world: int = 1, earlier: Mapping[str, RunConfig] | None = None
) -> Estimate:
    """Counts a run on `world` processes of `device` ("cuda" or "cpu").

    Raises:
        ConfigError: parts whose sizes cannot be known here.
        ValueError: a part is to be trained that the model does not have.
    """
    model = outline(config.model, earlier)
    if config.lora is not None:
        add_adapters(model, config.lora)
    freeze(model, config.stage, config.lora.parts if config.lora is not None else ())
    parameter_groups(model, config.stage)  # refuses what it would refuse the run
    parts = parts_of(model, config)
    optim = config.optim
    patches = model.vision_tower.num_tokens if hasattr(model, "vision_tower") else 0
    usual = min(optim.max_length, patches + _TEXT[config.stage.template])
    if isinstance(model, PatchReader):
        usual = 1 + len(FIELDS) * patches
    rows, length = optim.micro_batch, usual
    if optim.pack:
        length = optim.pack_into or optim.max_length
        rows = max(1, round(optim.micro_batch * usual / length))
    images = optim.micro_batch if patches else 0
    count = _Memory(model, config, device, world)
    samples = _samples(config)
    steps = optim.max_steps or (
        None if samples is None else max(1, round(optim.epochs * -(-samples // optim.global_batch)))
    )
    return Estimate(
        parts=parts,
        rows=rows,
        length=length,
        images=images,
        steps=steps,
        memory=count.peak(rows * length, images),
        longest=count.peak(rows * (length if optim.pack else optim.max_length), images)["peak"],
        flops=_flops(parts, config, patches) * optim.global_batch,
    )


def product_rate(device: str) -> float:
    """FLOP/s of large matrix products: of the CPU here measured, of a GPU as of an H100."""
    if device == "cuda":
        return _GPU_RATE
    from time import perf_counter

    a = torch.ones(1024, 1024)
    started = perf_counter()
    for _ in range(3):
        a @ a
    return 3 * 2 * 1024**3 / (perf_counter() - started)


def parts_of(model: nn.Module, config: RunConfig) -> list[Part]:
    """The parts that a model has, as the run trains them."""
    found = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        count = found[part_of(name)]
        count[0] += parameter.numel()
        count[1] += parameter.numel() * parameter.requires_grad
    return [Part(part, of[0], of[1], getattr(config.stage, part).lr) for part, of in found.items() if of[0]]


class _Memory:
    """Bytes on one device. `tokens` and `images` are those of a micro-batch."""

    def __init__(self, model: Model, config: RunConfig, device: str, world: int):
        self.model, self.config, self.device = model, config, device
        self.narrow = config.optim.bf16 and device == "cuda"
        self.b = 2 if self.narrow else 4
        self.world = world
        self.shards = world if config.parallel == "fsdp" else 1
        self.sizes = {name: (p.numel(), p.requires_grad, p.ndim) for name, p in model.named_parameters()}
        self.text: Any = model.config.get_text_config() if hasattr(model, "config") else None
        self.learns = {part_of(name) for name, (_, trained, _) in self.sizes.items() if trained}

    def peak(self, tokens: int, images: int) -> dict[str, float]:
        """By what the bytes are for, at the worst moment, and their sum."""
        trained = sum(n for n, learns, _ in self.sizes.values() if learns) * 4 / self.shards
        fixed = {
            "parameters": sum(n for n, _, _ in self.sizes.values()) * 4 / self.shards,
            "moments": 2 * trained,
        }
        optim = self.config.optim
        several = optim.global_batch > optim.micro_batch * self.world
        buckets = self.world > 1 and self.shards == 1  # DDP keeps its own, which the gradients are views of
        accumulated = trained if several or buckets else 0.0
        kept, layer = self._layers(tokens)
        moments = [
            # The end of the forward pass, the loss being computed; then the backward pass of the last layer.
            {"gradients": accumulated, "casts": self._casts(), "activations": kept + self._connector(images)}
            | {"work": max(self._loss(tokens), layer)},
            {"gradients": trained, "casts": 0.0, "activations": 0.0, "work": layer + self._connector(images)},
            {
                "gradients": accumulated,
                "casts": 0.0,
                "activations": 0.0,
                "work": self._vision(images) + self._heads(images),
            },
        ]
        worst = fixed | max(moments, key=lambda moment: sum(moment.values()))
        return worst | {"peak": sum(worst.values())}

    def _layers(self, tokens: int) -> tuple[float, float]:
        """Bytes that the backbone keeps for the backward pass, and those of one layer at work."""
        text, b = self.text, self.b
        if text is None:
            return 0.0, 0.0
        d, D, N = text.hidden_size, text.intermediate_size, text.state_size
        rank = int(text.time_step_rank)
        stream = (4 if text.residual_in_fp32 else b) * d
        states = 4 * D * N / _SAVED_EVERY[self.device]
        # x and z; the convolution's output and dt; B and C; the scan's saved states.
        inside = b * (2 * D + 2 * D + rank + 2 * N) + states
        if "language" in self.learns:  # what its linear maps read, for the gradients of their weights: norm's output, y
            inside += b * (d + D)
        layers = text.num_hidden_layers
        backward = inside + b * (4 * D + d) + stream  # gradients of xz, conv, dt, y on top of what is read
        # Embeddings and the embeddings with images in them; the final norm's input and output.
        ends = 2 * 4 * d + stream + b * d
        if not self.learns:
            return tokens * ends, tokens * inside
        again = float(self.config.optim.checkpoint_activations)
        kept = layers * (stream + (1 - again) * inside) + ends
        return tokens * kept, tokens * backward

    def _casts(self) -> float:
        """bf16 copies of weights that autocast holds during the forward pass; FSDP gathers bf16 weights instead."""
        if not self.narrow:
            return 0.0
        blocks = [
            (n, learns) for name, (n, learns, dims) in self.sizes.items() if dims == 2 and part_of(name) == "language"
        ]
        if self.shards > 1 and self.text is not None:
            rest = sum(n for name, (n, _, _) in self.sizes.items() if ".layers." not in name)
            return 2.0 * (rest + 2 * sum(n for n, _ in blocks) / max(1, self.text.num_hidden_layers))
        # Frozen weights are not cached by autocast, but kept by every layer whose backward pass needs them.
        again = float(self.config.optim.checkpoint_activations)
        return 2.0 * sum(n * (1.0 if learns else 1 - again) for n, learns in blocks)

    def _loss(self, tokens: int) -> float:
        share = 1.0 if self.config.stage.template == "plain" else 0.6
        if self.text is None:
            return 0.0
        text_tokens = min(tokens * share, _LOSS_CHUNK)
        return text_tokens * self.text.vocab_size * (self.b + 4 + 4 + 4)

    def _connector(self, images: int) -> float:
        connector = getattr(self.model, "connector", None)
        if connector is None:
            return 0.0
        patches, d, b = images * self.model.vision_tower.num_tokens, self.text.hidden_size, self.b
        kept = b * (connector.linear_in.in_features + 3 * d) + 4 * d
        for vss in (module for module in connector.modules() if isinstance(module, VSS)):
            D, K, N = vss.channels, len(vss.orders), vss.state_size
            kept += b * (2 * D + 2 * K * D + 4 * D) + 4 * K * D * N / _SAVED_EVERY[self.device]
        return float(patches * kept)

    def _vision(self, images: int) -> float:
        tower = getattr(self.model, "vision_tower", None)
        if tower is None:
            return 0.0
        config, patches = tower.config, images * tower.num_tokens
        layer = self.b * (2 * config.intermediate_size + 6 * config.hidden_size)
        return float(patches * layer * (tower.layer if "vision" in self.learns else 1))

    def _heads(self, images: int) -> float:
        """Logits of all patches, once more in float32, and their gradients."""
        if self.text is not None:
            return 0.0
        if isinstance(self.model, ContrastivePairs):  # pictures by texts, and by each of the words that are compared
            return float(images * images * (5 * 4 + MOST))
        return float(images * self.model.vision_tower.num_tokens * self.model.heads.out_features * (2 * self.b + 8))


def _flops(parts: list[Part], config: RunConfig, patches: int) -> float:
    """Of a usual sample: two a parameter and token forward, as much again for the gradient of inputs and of weights."""
    tokens = min(config.optim.max_length, patches + _TEXT[config.stage.template])
    again = 2 * float(config.optim.checkpoint_activations)
    learns = {part.name for part in parts if part.trained}
    total = 0.0
    for part in parts:
        passed = (part.name == "language" and bool(learns)) or part.name in learns  # gradients pass through it
        each = 2.0 * part.parameters + (2.0 * part.parameters if passed else 0.0) + 2.0 * part.trained
        each += again * part.parameters if part.name == "language" else 0.0
        total += each * (tokens if part.name == "language" else patches)
    return total


def _samples(config: RunConfig) -> int | None:
    """Samples of an epoch, as far as that can be known without the data."""
    from vlmamba.data.sources import open_source

    total = 0.0
    for source in config.data:
        if source.scenes is not None:
            total += source.size * source.weight
            continue
        assert source.llava is not None
        known = _COUNTS.get(Path(source.llava.file).name)
        try:
            total += open_source(source).supply.per_epoch
        except ValueError:
            if known is None:
                return None
            total += known * source.weight
    return round(total)


def _gb(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size > 2**29 else f"{size / 2**20:.1f} MiB"


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
