"""A Mamba of 130 million parameters on a CPU, ours and transformers': the prompt of 600 tokens, and token after token.

CPU time of one thread, all taken in turns: what a core has to work, whoever else uses the machine. (The limits above
are by the wall clock, of all cores, so on a busy machine they are low.) Rows by the wall clock, on all cores, are right
on a quiet machine only: its load meanwhile stands beside them. Where a token is decoded, "vlmamba" is the native
step that `forward` and `generate` take by themselves, "int8" the same with weight-only int8, where `read_as_int8` asked
for it, "modules" the model's modules one after the other.

Shapes: B batch, L length.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks import models, peers
from benchmarks.bench import Bench
from benchmarks.gate import scan_inputs
from benchmarks.timing import Clock, Timing, interleaved
from vlmamba import ops
from vlmamba.models import decode

PROMPT, STEPS = 600, 16
SCANS = ((1, 600, 1536), (4, 729, 1024), (1, 1024, 5120))


def run(bench: Bench) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            _scan(bench)
            for dtype in (torch.float32, torch.bfloat16):
                _model(bench, dtype)
    finally:
        torch.set_num_threads(threads)


def _scan(bench: Bench) -> None:
    """Everything in: softplus, D, gate. transformers' form takes (B, D, L), so it gets that layout to begin with."""
    for batch, length, channels in ((1, 8, 32),) if bench.toy else SCANS:
        x, dt, A, B, C, D, z, bias = scan_inputs(batch, length, channels, bench.device, torch.float32)
        turned = [t.transpose(1, 2).contiguous() for t in (x, dt, B, C, z)]
        theirs = peers.plain_mamba().mamba_selective_scan
        times = interleaved(
            {
                models.OURS: lambda a=(x, dt, A, B, C, D, z, bias): ops.selective_scan(*a, return_final_state=True),
                models.PLAIN: lambda t=turned, a=(A, D, bias), theirs=theirs: theirs(
                    t[0], t[1], a[0], t[2], t[3], a[1], z=t[4], delta_bias=a[2], delta_softplus=True,
                    return_last_state=True,
                ),
            },
            time.thread_time,
            budget=bench.seconds(6.0),
        )  # fmt: skip
        for who, timing in times.items():
            bench.add(f"scan fp32, B{batch} L{length} D{channels}", who, "one thread", timing, length=length)


def _model(bench: Bench, dtype: torch.dtype) -> None:
    size, length = ("toy", 12) if bench.toy else ("130m", PROMPT)
    config = models.mamba_config(size)
    ours, theirs = (
        models.placed(lambda c=cls: c(config), bench.device, dtype)
        for cls in (models.VLMambaForCausalLM, peers.plain_mamba().MambaForCausalLM)
    )
    ids = models.tokens(size, 1, length, bench.device)
    name = str(dtype).removeprefix("torch.")
    contenders: dict[str, nn.Module] = {models.OURS: ours, models.PLAIN: theirs}
    times = interleaved(
        {who: lambda m=m: models.read(m, ids) for who, m in contenders.items()},
        time.thread_time,
        budget=bench.seconds(20.0),
        most=9,
    )
    for who, timing in times.items():
        bench.add(f"prefill {size} {name}, {length} tokens", who, "one thread", timing, length=length)
    _decode(bench, f"decode {size} {name}, one token", ours, theirs, ids, "one thread", time.thread_time)
    if bench.wall:
        torch.set_num_threads(os.cpu_count() or 1)
        _decode(
            bench, f"decode {size} {name}, one token, wall clock", ours, theirs, ids, "all cores", time.perf_counter
        )
        torch.set_num_threads(1)


def _decode(
    bench: Bench, case: str, ours: nn.Module, theirs: nn.Module, ids: torch.Tensor, mode: str, clock: Clock
) -> None:
    ours, small = copy.deepcopy(ours), copy.deepcopy(ours)  # their native steps are made for this number of threads
    decode.read_as_int8(small)
    contenders = {
        models.OURS: _decoding(ours, ids),
        f"{models.OURS} int8": _decoding(small, ids),
        f"{models.OURS} modules": _decoding(ours, ids, modules=True),
        models.PLAIN: _decoding(theirs, ids),
    }
    before = os.getloadavg()[0]
    times = interleaved(contenders, clock, budget=bench.seconds(16.0))
    load = "" if mode == "one thread" else f", load {before:.1f} to {os.getloadavg()[0]:.1f}"
    for who, timing in times.items():
        share = Timing(timing.median / STEPS, timing.low / STEPS, timing.high / STEPS, timing.repeats)
        bench.add(case, who, mode + load, share)
    if mode == "one thread":
        for who, model in ((models.OURS, ours), (f"{models.OURS} int8", small)):
            error = _error(model, ours, ids)
            bench.add(f"{case}: relative error of {who}'s logits", who, "against modules", value=error, unit="")


def _decoding(model: Any, ids: torch.Tensor, modules: bool = False) -> Callable[[], None]:
    """A function of STEPS tokens, each the likeliest after the last, from the state of a short prompt. modules: from
    embeddings, which the native step does not take."""
    first = model(input_ids=ids[:, :8], use_cache=True, logits_to_keep=1)
    held = {"token": first.logits[:, -1:].argmax(-1), "state": first.cache_params}

    def steps() -> None:
        for _ in range(STEPS):
            token = held["token"]
            given = {"inputs_embeds": model.get_input_embeddings()(token)} if modules else {"input_ids": token}
            output = model(**given, cache_params=held["state"], use_cache=True, logits_to_keep=1)
            held["token"], held["state"] = output.logits[:, -1:].argmax(-1), output.cache_params

    return steps


def _error(model: Any, exact: Any, ids: torch.Tensor) -> float:
    """Of the logits of 16 tokens through the native step against the modules: 2-norm of the difference by theirs."""
    states = [exact(input_ids=ids[:, :8], use_cache=True, logits_to_keep=1).cache_params for _ in range(2)]
    found, expected = [], []
    for i in range(min(STEPS, ids.shape[1])):
        token = ids[:, i : i + 1]
        found.append(model(input_ids=token, cache_params=states[0], use_cache=True).logits.double())
        embedded = exact.get_input_embeddings()(token)
        expected.append(exact(inputs_embeds=embedded, cache_params=states[1], use_cache=True).logits.double())
    difference = torch.cat(found) - torch.cat(expected)
    return float(difference.norm() / torch.cat(expected).norm())
