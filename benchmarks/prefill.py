"""Reading a prompt: from tokens to the logits of the next one and the state, one sequence of 512 to 128K tokens and
batches, ours and the peers' alike eager and as one CUDA graph. "shipped" is ours as `model(...)` and `generate` read by
themselves: short prompts through graphs of its own, long ones in pieces.

Shapes: B batch, L length.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import models
from benchmarks.bench import Bench
from benchmarks.gate import relative
from benchmarks.timing import Timing, captured, measure

GRAPHED_UP_TO = 8192  # tokens; longer prompts keep the device busy by themselves
AGREE_UP_TO = 8192  # positions; the modules read a prompt in one piece
ROUNDING = 5e-2  # of two bfloat16 passes through 64 layers whose products are cut differently

# Who reads what (batch, length), the most telling first.
MARKS = ((1, 1024), (8, 1024), (1, 131072))
LENGTHS = ((1, 512), (1, 4096), (1, 32768), (1, 65536))
PARTS: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "marks": dict.fromkeys((models.OURS, models.MAMBA_SSM, models.TRANSFORMER), MARKS),
    "more": {
        models.KERNELS: (*MARKS[:2], *LENGTHS),
        **dict.fromkeys((models.OURS, models.MAMBA_SSM, models.TRANSFORMER), LENGTHS),
    },
    "last": {models.PLAIN: LENGTHS[:1]},  # a loop over positions in Python: 130,000 launches for 512
}


def run(bench: Bench) -> None:
    """One model in memory at a time; each gets its share of the time."""
    size = "toy" if bench.toy else "2.8b"
    dtype = torch.float32 if bench.toy else torch.bfloat16
    contenders = {c.who: c for c in models.language_models(size, bench.device, dtype)}
    plan = PARTS[bench.part]
    for who in bench.in_turn(list(plan)):
        cases = [(batch, length // 512 if bench.toy else length) for batch, length in plan[who]]
        if (refusal := contenders[who].refusal) is not None:
            bench.missing(case_of(size, *cases[0]), who, refusal)
            continue
        with bench.row_of(f"prefill {size}", who, "all"), torch.no_grad():
            _one(bench, size, contenders[who], cases)


def _one(bench: Bench, size: str, contender: models.LanguageModel, cases: list[tuple[int, int]]) -> None:
    """Builds one model and times it while its share lasts."""
    who, model, head, body = contender.who, None, 0, 0
    for batch, length in cases:
        if bench.over():
            bench.missing(case_of(size, batch, length), who)
            continue
        if model is None:
            model = contender.build()
            head = model.get_parameter("lm_head.weight").numel()  # for the last position alone; tied, so counted once
            body = models.count_parameters(model) - head
        ids = models.tokens(size, batch, length, bench.device)
        graphed = bench.device.type == "cuda" and batch * length <= GRAPHED_UP_TO and who != models.PLAIN
        for mode, function in _ways(contender, graphed).items():
            with bench.row_of(case_of(size, batch, length), who, mode):
                note = _agreement(model, ids) if mode == "shipped" and length <= AGREE_UP_TO else ""
                timing = _time(bench, partial(function, model, ids), mode == "graph")
                bench.add(
                    case_of(size, batch, length),
                    who,
                    mode,
                    timing,
                    floor_flops=2.0 * batch * (body * length + head),
                    note=note,
                    batch=batch,
                    length=length,
                )


def _ways(contender: models.LanguageModel, graphed: bool) -> dict[str, Callable[[Any, torch.Tensor], Any]]:
    ours = contender.who == models.OURS
    plain = models.read_through_modules if ours else contender.prefill
    shipped = {"shipped": contender.prefill} if ours else {}
    return {**shipped, "eager": plain, **({"graph": plain} if graphed else {})}


def _agreement(model: Any, ids: torch.Tensor) -> str:
    """How the logits of the shipped way compare with those of the modules; an error if by more than rounding."""
    for _ in range(3):  # the first prompt of a size runs kernel by kernel, the second is captured
        shipped = models.read(model, ids)
    exact = models.read_through_modules(model, ids)
    if torch.equal(shipped, exact):
        return "logits bit for bit those of the modules"
    error = relative(shipped, exact)
    if not error <= ROUNDING:
        raise ValueError(f"logits are off by {error:.2g} from those of the modules, more than {ROUNDING}")
    return f"logits within {error:.1g} of those of the modules"


def _time(bench: Bench, function: Callable[[], Any], graph: bool) -> Timing:
    if graph:
        return measure(captured(function, warmup=2), device=bench.device, budget=bench.seconds(1.0), least=3, warmup=1)
    return measure(function, device=bench.device, budget=bench.seconds(1.0), least=1, warmup=1, most=50)


def case_of(size: str, batch: int, length: int) -> str:
    return f"prefill {size}, B{batch} L{length}"
