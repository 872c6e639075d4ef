"""Token after token: what the peers reach, and our modules without a graph.

A step is everything: embedding, layers, head, the choice of the likeliest token, and feeding it back. mamba-ssm,
transformers' Mamba with its kernels and the Transformer (static cache of 1,024 tokens, its steps attend to all of it)
run as a CUDA graph and eager, the Transformer also compiled. Each keeps its state as it does by itself: mamba-ssm in
bfloat16, transformers' Mamba and ours in float32. Our captured step is measured in decode.py under the same names.

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

BATCHES = (1, 8, 64, 256)
PROMPT, CACHE = 512, 1024
MOST = 200  # steps of one measurement; warm-up and capture take some more: fewer than CACHE - PROMPT in all
COMPILING = 90  # seconds, about

# Who, how, at which batch sizes.
PARTS: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {
    "marks": [(models.MAMBA_SSM, "graph", BATCHES), (models.TRANSFORMER, "graph", BATCHES)],
    "more": [
        (models.KERNELS, "graph", BATCHES),
        (models.MAMBA_SSM, "eager", BATCHES),
        (models.TRANSFORMER, "eager", BATCHES),
        (models.KERNELS, "eager", BATCHES),
        (models.OURS, "eager", BATCHES),
    ],
    "last": [(models.PLAIN, "eager", (1, 8)), (models.TRANSFORMER, "compiled", (1,))],
}
Step = Callable[[], None]


def run(bench: Bench) -> None:
    size = "toy" if bench.toy else "2.8b"
    dtype = torch.float32 if bench.toy else torch.bfloat16
    contenders = {c.who: c for c in models.language_models(size, bench.device, dtype)}
    on_gpu = bench.device.type == "cuda"
    for who, mode, batches in bench.in_turn([p for p in PARTS[bench.part] if p[1] == "eager" or on_gpu]):
        contender = contenders[who]
        if contender.refusal is not None:
            bench.missing(f"decode {size}, B1", who, contender.refusal)
            continue
        with bench.row_of(f"decode {size}, B1", who, mode), torch.no_grad():
            _one(bench, size, contender, mode, batches[: 2 if bench.toy else None])


def _one(bench: Bench, size: str, contender: models.LanguageModel, mode: str, batches: tuple[int, ...]) -> None:
    who, model = contender.who, None
    for batch in batches:
        case = f"decode {size}, B{batch}"
        if bench.over(COMPILING if mode == "compiled" else 2):
            bench.missing(case, who)
            continue
        with bench.row_of(case, who, mode):
            model = model or contender.build()
            _time(bench, case, who, mode, _step(who, mode, model, _prompt(bench, size, batch)), batch)


def _step(who: str, mode: str, model: Any, prompt: Tensor) -> Step:
    if who == models.MAMBA_SSM:
        return _mamba_ssm(model, prompt)
    if who == models.TRANSFORMER:
        return _transformer(model, prompt, torch.compile(model, dynamic=False) if mode == "compiled" else model)
    return with_state(model, prompt, _through_modules if who == models.OURS else _by_itself)


def _time(bench: Bench, case: str, who: str, mode: str, step: Step, batch: int) -> None:
    if mode != "eager":
        step = captured(step)
    most = 3 if bench.toy else MOST
    timing = measure(step, device=bench.device, budget=bench.seconds(1.0), most=most, warmup=3)
    bench.add(case, who, mode, timing, unit="tokens/s", work=batch, batch=batch)


def _prompt(bench: Bench, size: str, batch: int) -> Tensor:
    return models.tokens(size, batch, 8 if bench.toy else PROMPT, bench.device)


def with_state(model: Any, prompt: Tensor, read: Callable[[Any, Tensor, Any], Tensor]) -> Step:
    """Ours, and transformers' Mamba: the state is an argument."""
    output = model(input_ids=prompt[:, :16], use_cache=True, logits_to_keep=1)
    token, state = output.logits[:, -1:].argmax(-1), output.cache_params

    def step() -> None:
        token.copy_(read(model, token, state)[:, -1:].argmax(-1))

    return step


def _by_itself(model: Any, token: Tensor, state: Any) -> Tensor:
    """Logits (B, 1, V) as the model gives them: transformers' carries a float32 residual stream, also out of its last
    norm, which only its own `forward` brings back to the head's dtype."""
    return model(input_ids=token, cache_params=state, use_cache=True, logits_to_keep=1).logits


def _through_modules(model: Any, token: Tensor, state: Any) -> Tensor:
    """Logits (B, 1, V) of ours without the captured step that its `forward` takes by itself."""
    return model.lm_head(model.backbone(token, cache_params=state, use_cache=True)[0])


def _transformer(model: Any, prompt: Tensor, run: Any) -> Step:
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    token = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def step() -> None:
        logits = run(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
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
