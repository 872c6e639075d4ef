"""Token after token: what the peers reach, and our modules without a graph.

A step is everything: embedding, layers, head, the choice of the likeliest token, and feeding it back. mamba-ssm and the
Transformer (static cache of 1,024 tokens, its steps attend to all of it) run eager and as a CUDA graph, the
Transformer also compiled. Our captured step is measured in decode.py under the same names.

Shapes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks import models
from benchmarks.bench import Bench
from benchmarks.timing import captured, measure

BATCHES = (1, 64, 8, 256)
PROMPT, CACHE = 512, 1024
MOST = 200  # steps of one measurement; warm-up and capture take some more: fewer than CACHE - PROMPT in all
COMPILING = 90  # seconds, about

Step = Callable[[], None]


def run(bench: Bench) -> None:
    size = "toy" if bench.toy else "2.8b"
    dtype = torch.float32 if bench.toy else torch.bfloat16
    contenders = models.language_models(size, bench.device, dtype)
    for i, contender in enumerate(contenders):
        case = f"decode {size}, B1"
        if contender.refusal is not None:
            bench.missing(case, contender.who, contender.refusal)
            continue
        until = bench.left() * (1 - 1 / (len(contenders) - i))
        with bench.row_of(case, contender.who, "all"), torch.no_grad():
            _one(bench, size, contender, until)


def _one(bench: Bench, size: str, contender: models.LanguageModel, until: float) -> None:
    who, model = contender.who, contender.build()
    on_gpu = bench.device.type == "cuda"
    start = {models.MAMBA_SSM: _mamba_ssm, models.TRANSFORMER: _transformer}.get(who, _with_state)
    graphed = on_gpu and who in (models.MAMBA_SSM, models.TRANSFORMER)
    for batch in BATCHES[: 2 if bench.toy else None]:
        case = f"decode {size}, B{batch}"
        if who == models.PLAIN and batch > 8:
            continue
        for mode in ("eager", "graph") if graphed else ("eager",):
            if bench.left() < max(until, 2):
                bench.missing(case, who, "no time left in this run")
                return
            with bench.row_of(case, who, mode):
                _time(bench, case, who, mode, start(model, _prompt(bench, size, batch)), batch)
    if on_gpu and who == models.TRANSFORMER and bench.left() > max(until, COMPILING):
        with bench.row_of(f"decode {size}, B1", who, "compiled"):
            step = _transformer(model, _prompt(bench, size, 1), torch.compile(model, dynamic=False))
            _time(bench, f"decode {size}, B1", who, "compiled", step, 1)


def _time(bench: Bench, case: str, who: str, mode: str, step: Step, batch: int) -> None:
    if mode != "eager":
        step = captured(step)
    most = 3 if bench.toy else MOST
    timing = measure(step, device=bench.device, budget=bench.seconds(1.0), most=most, warmup=3)
    bench.add(case, who, mode, timing, unit="tokens/s", work=batch, batch=batch)


def _prompt(bench: Bench, size: str, batch: int) -> Tensor:
    return models.tokens(size, batch, 8 if bench.toy else PROMPT, bench.device)


def _with_state(model: Any, prompt: Tensor) -> Step:
    """Ours through its modules, and transformers' Mamba: the state is an argument."""
    output = model(input_ids=prompt[:, :16], use_cache=True, logits_to_keep=1)
    token, state = output.logits[:, -1:].argmax(-1), output.cache_params

    def step() -> None:
        hidden = model.backbone(token, cache_params=state, use_cache=True)[0]
        token.copy_(model.lm_head(hidden).argmax(-1))

    return step


def _transformer(model: Any, prompt: Tensor, run: Any = None) -> Step:
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    token = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def step() -> None:
        logits = (run or model)(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
        token.copy_(logits[:, -1:].argmax(-1))

    return step


def _mamba_ssm(model: Any, prompt: Tensor) -> Step:
    from mamba_ssm.utils.generation import InferenceParams

    state = InferenceParams(max_seqlen=CACHE, max_batch_size=len(prompt))
    token = model(prompt[:, :16], inference_params=state, num_last_tokens=1).logits[:, -1:].argmax(-1)
    state.seqlen_offset = 16

    def step() -> None:
        logits = model(token, inference_params=state, num_last_tokens=1).logits
        token.copy_(logits[:, -1:].argmax(-1))

    return step
