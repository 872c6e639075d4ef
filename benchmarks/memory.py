"""Memory of one sequence by its length: ours in chunks from a state (the caller's, or those that `model(...)` makes by
itself: "shipped"), a Transformer with the cache it needs.

The peak is counted above the weights. Shapes: L length.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import models
from benchmarks.bench import NO_TIME, Bench

CHUNK = 4096
PARTS: dict[str, dict[str, tuple[int, ...]]] = {
    "marks": {models.OURS: (4096, 262144)},
    "more": {models.OURS: (32768, 131072), models.TRANSFORMER: (4096, 32768, 131072, 262144)},
}


def run(bench: Bench) -> None:
    size = "toy" if bench.toy else "2.8b"
    dtype = torch.float32 if bench.toy else torch.bfloat16
    contenders = {c.who: c for c in models.language_models(size, bench.device, dtype)}
    for who in bench.in_turn(list(PARTS[bench.part])):
        with bench.row_of(f"one sequence, {size}", who, "all"), torch.no_grad():
            _one(bench, size, contenders[who], PARTS[bench.part][who])


def _one(bench: Bench, size: str, contender: models.LanguageModel, lengths: tuple[int, ...]) -> None:
    who, model = contender.who, contender.build()
    shrink = 256 if bench.toy else 1
    bench.free()
    weights = torch.cuda.memory_allocated() / 2**30 if bench.device.type == "cuda" else 0.0
    growth = 1 if who == models.OURS else 2  # the power of the length by which the time grows
    whole = "shipped" if who == models.OURS else "in one piece"
    # Whichever is cut short, the other says how it goes on.
    for mode, chunk in ((whole, max(lengths)), (f"chunks of {CHUNK // shrink}", CHUNK // shrink)):
        for _ in range(2):  # compiles, tunes; ours captures short prompts at the second one
            _read(model, who, models.tokens(size, 1, CHUNK // shrink, bench.device), chunk)
        seconds, before = 0.0, 1
        for length in (length // shrink for length in lengths):
            case = f"one sequence of {length} tokens"
            if bench.over(seconds * (length / before) ** growth + 2):
                bench.missing(f"{case}, memory above the weights", who, f"{mode}: {NO_TIME}")
                continue
            with bench.row_of(f"{case}, memory above the weights", who, mode):
                ids = models.tokens(size, 1, length, bench.device)
                seconds, peak = bench.peak(lambda ids=ids, chunk=chunk: _read(model, who, ids, chunk))
                before = length
                above = f"{case}, memory above the weights"
                bench.add(above, who, mode, unit="GiB", value=peak - weights, length=length)
                bench.add(f"{case}, time", who, mode, unit="ms", value=seconds * 1e3, length=length)


def _read(model: Any, who: str, ids: torch.Tensor, chunk: int) -> None:
    """The whole prompt, chunk by chunk, each continuing from the last: both kinds of model can."""
    carried = "cache_params" if who == models.OURS else "past_key_values"
    state: dict[str, Any] = {}
    for part in ids.split(chunk, dim=1):
        output = model(input_ids=part, use_cache=True, logits_to_keep=1, **state)
        state = {carried: getattr(output, carried)}
