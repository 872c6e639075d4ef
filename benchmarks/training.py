"""A training step of 16K tokens: forward, backward, clipping and AdamW, fp32 master weights under bf16 autocast.

The figure is 6 x parameters x real tokens over the time: what recomputation costs is not credited. Held against the
product rate of the same run. What does not fit in memory in one piece is tried in two and four micro-batches.

Shapes: B rows, L length, M micro-batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks import models, peers
from benchmarks.bench import Bench
from benchmarks.timing import Timing
from vlmamba.data.collate import NO_LABEL, Batch
from vlmamba.models.mamba import VLMambaForCausalLM
from vlmamba.training.optimizer import is_decayed
from vlmamba.training.step import Step

ROWS, LENGTH = 8, 2048
# How a step may be run, the fastest first; what does not fit in memory becomes a row that says so, and the next is
# tried.
WAYS = ((1, False), (2, False), (4, False), (1, True))


def run(bench: Bench) -> None:
    size = "toy" if bench.toy else "2.8b"
    builders: dict[str, Callable[[], nn.Module]] = {
        models.OURS: lambda: VLMambaForCausalLM(models.mamba_config(size)),
        models.TRANSFORMER: lambda: LlamaForCausalLM(models.llama_config(size)),
        models.MAMBA_SSM: lambda: _WithLoss(models.mamba_ssm_model(size)),
    }
    refusal = peers.refusal("mamba-ssm")
    if refusal is not None or bench.device.type != "cuda":
        bench.missing(_case(bench.toy), models.MAMBA_SSM, refusal or "its kernels need a GPU")
        del builders[models.MAMBA_SSM]
    for who in bench.in_turn(list(builders)):
        if bench.over(8):
            bench.missing(_case(bench.toy), who)
            continue
        with bench.row_of(f"training step {size}", who, "all"):
            _one(bench, size, who, builders[who])


def _one(bench: Bench, size: str, who: str, build: Callable[[], nn.Module]) -> None:
    model = models.placed(build, bench.device, torch.float32).train()
    rows, length = _shape(bench.toy)
    parameters, tokens, case = models.count_parameters(model), rows * length, _case(bench.toy)
    step = Step(model, _optimizer(model, bench.device), bench.device, lambda pixels: pixels, 1.0, bf16=True)
    for micro, checkpointing in WAYS if not bench.toy else WAYS[:1]:
        mode = f"{micro} micro-batch{'es' * (micro > 1)}" + (", checkpointing" if checkpointing else "")
        if checkpointing and not hasattr(model, "gradient_checkpointing_enable"):
            break
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with bench.row_of(case, who, mode):
            batches = _batches(size, rows, length, micro, packed=who == models.OURS)
            timing, peak = _steps(bench, step, batches)
            flops = 6.0 * parameters * tokens
            bench.add(case, who, mode, timing, unit="tokens/s", work=tokens, floor_flops=flops, note=peak)
            break
        step.optimizer.zero_grad(set_to_none=True)  # what a step that ran out of memory left behind
        bench.free()


class _WithLoss(nn.Module):
    """mamba-ssm's model has no loss of its own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, num_items_in_batch: int, use_cache: bool) -> SimpleNamespace:
        logits = self.model(input_ids).logits[:, :-1]
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
        return SimpleNamespace(loss=total / num_items_in_batch)


def _shape(toy: bool) -> tuple[int, int]:
    return (2, 16) if toy else (ROWS, LENGTH)


def _case(toy: bool) -> str:
    rows, length = _shape(toy)
    return f"training step {'toy' if toy else '2.8b'}, {rows * length} tokens ({rows} full rows of {length})"


def _steps(bench: Bench, step: Step, batches: list[Batch]) -> tuple[Timing, str]:
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    samples: list[float] = []
    for i in range(2 if bench.toy or bench.rehearsal else 7):
        before = time.perf_counter()
        step(batches).read()
        bench.wait()
        if i:  # the first one warms up: autotuning, memory, the optimiser's moments
            samples.append((time.perf_counter() - before) * 1e3)
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else 0.0
    return Timing.of(samples), f"peak {peak:.0f} GiB"


def _batches(size: str, rows: int, length: int, micro: int, packed: bool) -> list[Batch]:
    """Rows filled to the last token: ours with packed sequences of 200 to 700 tokens, kept apart; the peers, which
    cannot keep them apart with the kernels at hand, take a row as one sequence."""
    ids = models.tokens(size, rows, length, torch.device("cpu"))
    seq_idx = torch.zeros(rows, length, dtype=torch.int32)
    for row in range(rows):
        cuts = torch.cumsum(torch.randint(200, 700, (length // 200 + 1,)), 0)
        seq_idx[row] = torch.bucketize(torch.arange(length), cuts, right=True)
    labels = ids.clone()
    labels[:, 0] = NO_LABEL
    if packed:  # nothing stands before the first token of a sequence to predict it from
        labels[:, 1:][seq_idx[:, 1:] != seq_idx[:, :-1]] = NO_LABEL
    return [
        Batch(part, wanted, index if packed else None, None, int((wanted != NO_LABEL).sum()), part.numel(), ())
        for part, wanted, index in zip(ids.chunk(micro), labels.chunk(micro), seq_idx.chunk(micro))
    ]


def _optimizer(model: nn.Module, device: torch.device) -> torch.optim.AdamW:
    decayed = [p for name, p in model.named_parameters() if is_decayed(name, p)]
    kept = [p for name, p in model.named_parameters() if not is_decayed(name, p)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=2e-5, fused=device.type == "cuda" or None)
