"""One block of width 2560 (norm, mixer, residual): forward, and forward with backward, in bf16.

Shapes: B batch, L length, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks import models, peers
from benchmarks.bench import Bench
from benchmarks.timing import measure, rotating
from vlmamba.models.mamba import MambaBlock

CASES = ((16, 1024), (1, 1024), (1, 4096), (8, 2048))


def run(bench: Bench) -> None:
    size = "toy" if bench.toy else "2.8b"
    dtype = torch.float32 if bench.toy else torch.bfloat16
    width = models.WIDTHS[size][0]
    config = models.mamba_config(size)
    blocks: dict[str, Callable[[], nn.Module]] = {models.OURS: lambda: MambaBlock(config, 0)}
    if peers.refusal("mamba-ssm") is None and bench.device.type == "cuda":
        blocks[models.MAMBA_SSM] = lambda: _mamba_ssm_block(width)
    else:
        bench.missing(_case(size, *CASES[0], False), models.MAMBA_SSM, peers.refusal("mamba-ssm") or "it needs a GPU")
    blocks[f"half a {models.TRANSFORMER} layer"] = lambda: _Attention(size)
    for who in bench.in_turn(list(blocks)):
        with bench.row_of(f"block {size}", who, "all"):
            _all(bench, size, who, blocks[who], dtype)


def _all(bench: Bench, size: str, who: str, build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = _initialised(build, bench.device, dtype)
    for batch, length in CASES:
        _one(bench, size, who, model, batch, length // 128 if bench.toy else length, dtype)


def _one(bench: Bench, size: str, who: str, model: nn.Module, batch: int, length: int, dtype: torch.dtype) -> None:
    width = models.WIDTHS[size][0]
    share = 0.5 if isinstance(model, _Attention) else 1.0  # a Transformer layer holds the parameters of two blocks
    products = 2.0 * models.count_parameters(model) * batch * length * share
    inputs = rotating(
        lambda: (torch.randn(batch, length, width, device=bench.device, dtype=dtype, requires_grad=True),),
        bench.device,
        most=4,
    )

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    def both(x: Tensor) -> None:
        y = model(x)
        y.backward(y.detach())
        model.zero_grad(set_to_none=True)
        x.grad = None

    for backward, function, work in ((False, forward, products), (True, both, 3 * products)):
        case = _case(size, batch, length, backward)
        if bench.over(1):
            bench.missing(case, who)
            continue
        with bench.row_of(case, who, "eager"):
            timing = measure(function, inputs, device=bench.device, budget=bench.seconds(0.4))
            if share != 1:
                timing = type(timing)(timing.median * share, timing.low * share, timing.high * share, timing.repeats)
            bench.add(case, who, "eager", timing, floor_flops=work, batch=batch, length=length)


def _initialised(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights of a size that keeps activations near one; a scan's own parameters as a real model has them."""
    model = models.placed(build, device, dtype).train()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "A_log" not in name:
            nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if hasattr(module, "dt_bias") and hasattr(module, "reset"):
            module.reset(0.001, 0.1, 1e-4)
        elif "Conv1d" in type(module).__name__ and getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return model


class _Attention(nn.Module):
    """A layer of the Transformer of the same size; half of it has the parameters of one Mamba block."""

    def __init__(self, size: str):
        super().__init__()
        config = models.llama_config(size)
        self.layer, self.rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        out: Any = self.layer(x, position_embeddings=self.rotary(x, positions))
        return out[0] if isinstance(out, tuple) else out


def _mamba_ssm_block(width: int) -> nn.Module:
    from mamba_ssm.models.mixer_seq_simple import create_block

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = create_block(width, 0, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, layer_idx=0)

        def forward(self, x: Tensor) -> Tensor:
            out, residual = self.block(x)
            return out + residual

    return Alone()


def _case(size: str, batch: int, length: int, backward: bool) -> str:
    return f"block {size}, B{batch} L{length}, forward{' + backward' if backward else ''}"
