"""A Mamba of 130 million parameters on a CPU, ours and transformers': the prompt of 600 tokens, and token after token.

CPU time of one thread, the two taken in turns: what a core has to work, whoever else uses the machine. (The limits
above are by the wall clock, of all cores, so on a busy machine they are low.)

Shapes: B batch, L length.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from benchmarks import models, peers
from benchmarks.bench import Bench
from benchmarks.gate import scan_inputs
from benchmarks.timing import Timing, interleaved
from vlmamba import ops

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
    times = interleaved(
        {who: _decoding(model, ids) for who, model in contenders.items()},
        time.thread_time,
        budget=bench.seconds(8.0),
    )
    for who, timing in times.items():
        share = Timing(timing.median / STEPS, timing.low / STEPS, timing.high / STEPS, timing.repeats)
        bench.add(f"decode {size} {name}, one token", who, "one thread", share)


def _decoding(model: Any, ids: torch.Tensor) -> Any:
    """A function of STEPS tokens, each the likeliest after the last, from the state of a short prompt."""
    first = model(input_ids=ids[:, :8], use_cache=True, logits_to_keep=1)
    held = {"token": first.logits[:, -1:].argmax(-1), "state": first.cache_params}

    def steps() -> None:
        for _ in range(STEPS):
            output = model(input_ids=held["token"], cache_params=held["state"], use_cache=True, logits_to_keep=1)
            held["token"], held["state"] = output.logits[:, -1:].argmax(-1), output.cache_params

    return steps
