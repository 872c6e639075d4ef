"""Times of functions: medians with spread, over buffers that rotate through more memory than the cache holds.

On a GPU by device events, one function a CUDA graph where asked for; on a CPU by the CPU time of the calling thread
(`cpu_times`), so that other people's work on the machine blurs little, or by the wall clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, and the quartiles around it."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Timing:
        ordered = sorted(samples_ms)
        if not ordered:
            raise ValueError("no sample was taken")
        quartile = len(ordered) // 4
        return cls(statistics.median(ordered), ordered[quartile], ordered[-1 - quartile], len(ordered))

    def __str__(self) -> str:
        return f"{self.median:.4g} ms ({self.low:.4g} to {self.high:.4g}, {self.repeats} times)"


def rotating(
    make: Callable[[], Any], device: torch.device | str, most: int = 64, cache: int | None = None
) -> list[Any]:
    """Enough fresh results of `make()` (a tensor, or tensors in tuples, lists, dicts) to exceed the cache three times.

    Args:
        most: no more sets than this (a function whose inputs are tiny lives in the cache in real life as well).
        cache: bytes; the device's L2 if not given, and 64 MiB on a CPU.
    """
    device = torch.device(device)
    if cache is None:
        on_gpu = device.type == "cuda"
        cache = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 64 * 2**20
    first = make()
    count = min(most, max(2, -(-3 * cache // max(nbytes(first), 1))))
    return [first, *(make() for _ in range(count - 1))]


def nbytes(value: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(nbytes(item) for item in value) if isinstance(value, (list, tuple)) else 0


def measure(
    function: Callable[..., Any],
    inputs: Sequence[Any] = ((),),
    *,
    device: torch.device | str,
    budget: float = 1.0,
    graph: bool = False,
    warmup: int = 3,
    least: int = 5,
    most: int = 200,
) -> Timing:
    """The time of `function(*inputs[i])`, i going round.

    Args:
        inputs: argument tuples (make them with `rotating`).
        budget: seconds to spend on the measurement, warm-up apart; at least `least` and at most `most` samples. With
            `least` 1, a function that takes longer than this is called once after the warm-up.
        graph: capture one call per input set in a CUDA graph and time replays: launches cost next to nothing, as in a
            model that is captured. A sample is then a replay divided by the number of sets. Ignored on a CPU.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return _measure_clock(function, inputs, time.perf_counter, budget, min(warmup, 1), min(least, 3), most)
    if graph:
        replay = captured(lambda: [function(*args) for args in inputs], warmup)
        timing = _measure_events(lambda: replay(), [()], budget, 2, least, most)
        share = len(inputs)
        return Timing(timing.median / share, timing.low / share, timing.high / share, timing.repeats)
    return _measure_events(function, inputs, budget, max(warmup, min(len(inputs), 8)), least, most)


def captured(function: Callable[[], Any], warmup: int = 3) -> Callable[[], None]:
    """A CUDA graph of `function()`; call the result to replay it. What the function returns is kept alive with it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay(_kept: Any = kept) -> None:
        graph.replay()

    return replay


def cpu_times(
    function: Callable[..., Any], inputs: Sequence[Any] = ((),), *, budget: float = 1.0, least: int = 3, most: int = 100
) -> Timing:
    """CPU time of the calling thread: what one core has to work, whoever else uses the machine meanwhile.

    Torch must be told to use one thread (`torch.set_num_threads(1)`), or the others' work is not counted.
    """
    if torch.get_num_threads() != 1:
        raise ValueError(f"torch uses {torch.get_num_threads()} threads; call torch.set_num_threads(1) first")
    return _measure_clock(function, inputs, time.thread_time, budget, 1, least, most)


def process_times(
    function: Callable[..., Any], inputs: Sequence[Any] = ((),), *, budget: float = 1.0, least: int = 3, most: int = 100
) -> Timing:
    """CPU time of all threads together."""
    return _measure_clock(function, inputs, time.process_time, budget, 1, least, most)


def interleaved(
    functions: dict[str, Callable[[], Any]], clock: Clock, *, budget: float = 4.0, least: int = 3, most: int = 50
) -> dict[str, Timing]:
    """Times of several functions taken in turns, so that a machine whose speed drifts treats them alike."""
    for function in functions.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + budget
    while len(next(iter(samples.values()))) < least or (
        time.perf_counter() < end and len(next(iter(samples.values()))) < most
    ):
        for name, function in functions.items():
            before = clock()
            function()
            samples[name].append((clock() - before) * 1e3)
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _measure_clock(
    function: Callable[..., Any], inputs: Sequence[Any], clock: Clock, budget: float, warmup: int, least: int, most: int
) -> Timing:
    for i in range(warmup):
        function(*inputs[i % len(inputs)])
    samples: list[float] = []
    end = time.perf_counter() + budget
    while len(samples) < least or (time.perf_counter() < end and len(samples) < most):
        args = inputs[len(samples) % len(inputs)]
        before = clock()
        function(*args)
        samples.append((clock() - before) * 1e3)
    return Timing.of(samples)


def _measure_events(
    function: Callable[..., Any], inputs: Sequence[Any], budget: float, warmup: int, least: int, most: int
) -> Timing:
    for i in range(warmup):
        function(*inputs[i % len(inputs)])
    torch.cuda.synchronize()
    before = time.perf_counter()
    function(*inputs[0])
    torch.cuda.synchronize()
    once = max(time.perf_counter() - before, 1e-6)
    if least == 1 and once >= budget:
        return Timing.of([1e3 * once])
    count = max(least, min(most, int(budget / once)))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i, (start, stop) in enumerate(pairs):
            args = inputs[i % len(inputs)]
            start.record()
            function(*args)
            stop.record()
        torch.cuda.synchronize()
    finally:
        if collecting:
            gc.enable()
    return Timing.of([start.elapsed_time(stop) for start, stop in pairs])
