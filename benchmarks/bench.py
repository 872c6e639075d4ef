"""What a section is given: the device, the time left, the machine's limits, and where its rows go."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from benchmarks.report import MISSING, Report, Row, timed
from benchmarks.timing import Timing

T = TypeVar("T")
NO_TIME = "no time left in this run"


class Bench:
    """The run of one section.

    Attributes:
        device: cuda or cpu. toy: tiny shapes, to try everything on any machine; the numbers mean nothing then.
        limits: the machine's measured limits: "copy" (bytes/s, read plus written), "product" (bf16 FLOP/s).
        wall: on a CPU, take the time of all cores by the wall clock too: it says something on a quiet machine only.
        rehearsal: nothing is measured for longer than it must be; all that counts is what gets compiled.
        begun: sections of which something was measured in this run.
        part: what of the section is to be measured now: "marks" (what the project aims at, beside the best peers),
            "more" (wider sweeps, other peers) or "last" (what takes a minute a number).
    """

    def __init__(
        self,
        report: Report,
        device: torch.device,
        toy: bool,
        limits: dict[str, float],
        wall: bool = False,
        rehearsal: bool = False,
    ):
        self.report, self.device, self.toy, self.limits, self.wall = report, device, toy, limits, wall
        self.rehearsal = rehearsal
        self.section, self.part, self._end, self._until = "", "marks", float("inf"), 0.0
        self.begun: set[str] = set()

    def begin(self, section: str, seconds: float, part: str = "marks") -> None:
        """The first time in this run, an earlier run's rows of the section become what is kept until it is replaced."""
        self.section, self.part, self._end, self._until = section, part, time.monotonic() + seconds, 0.0
        if section not in self.begun:
            self.begun.add(section)
            self.report.start(section)

    def left(self) -> float:
        """Seconds left for this part of the section."""
        return self._end - time.monotonic()

    def seconds(self, most: float) -> float:
        """What to spend on one measurement: `most`, less when the time runs out."""
        return 0.005 if self.toy or self.rehearsal else max(0.1, min(most, self.left() / 4))

    def in_turn(self, items: Sequence[T]) -> Iterator[T]:
        """One after the other; each is `over` when it has had its share of the time left."""
        for i, item in enumerate(items):
            self._until = self.left() * (1 - 1 / (len(items) - i))
            yield item
        self._until = 0.0

    def over(self, least: float = 2.0) -> bool:
        """Whether something that takes `least` seconds would take the time of what comes after it."""
        return self.left() < (0 if self.toy or self.rehearsal else max(self._until, least))

    def add(
        self,
        case: str,
        who: str,
        mode: str,
        timing: Timing | None = None,
        *,
        unit: str = "ms",
        work: float | None = None,
        value: float | None = None,
        floor_bytes: float | None = None,
        floor_flops: float | None = None,
        note: str = "",
        **shape: float,
    ) -> Row:
        """One row: a timing (in ms, or `work` per second) or a plain value.

        `floor_bytes`: the least memory traffic of a call, `floor_flops` its matrix work: the row then says what
        fraction of the machine's measured limit was reached (of the limit that takes longer, if both are given).
        """
        numbers: dict[str, float] = {} if value is None else {"value": value}
        fraction, limit = None, ""
        if timing is not None:
            numbers = timed(timing, work)
            note = ", ".join([*[note] * bool(note), *["once"] * (timing.repeats == 1)])
            floors = [(floor_bytes, "copy", "of copy bandwidth"), (floor_flops, "product", "of the bf16 product")]
            times = [(floor / self.limits[key], name) for floor, key, name in floors if floor and key in self.limits]
            if times:
                least, limit = max(times)
                fraction = least / (timing.median / 1e3)
        row = Row(
            self.section, case, who, mode, unit, **numbers, fraction=fraction, limit=limit, note=note, shape=shape
        )
        print(f"{self.section:10} {case:42} {who:24} {mode:10} {_short(row)}", flush=True)
        return self.report.add(row)

    def missing(self, case: str, who: str, reason: str = NO_TIME) -> None:
        """A row that says why this peer has no number."""
        self.add(case, who, MISSING, note=reason)

    @contextmanager
    def row_of(self, case: str, who: str, mode: str) -> Iterator[None]:
        """Turns a failure inside into a row that says so, and frees memory afterwards. After a failure of ours the
        whole program exits with an error."""
        try:
            yield
        except torch.cuda.OutOfMemoryError:
            self.add(case, who, mode, note="out of memory")
        except Exception as error:
            self.add(case, who, mode, note=f"failed: {type(error).__name__}: {str(error).split(chr(10))[0]}")
        finally:
            self.free()

    def free(self) -> None:
        """Gives back device memory that nothing uses any more (a model is held by reference cycles)."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, function: Callable[[], Any]) -> tuple[float, float]:
        """Seconds that `function` took and the peak of device memory meanwhile, in GiB (0 on a CPU)."""
        self.free()
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = time.perf_counter()
        function()
        self.wait()
        seconds = time.perf_counter() - before
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        return seconds, peak


def _short(row: Row) -> str:
    if row.value is None:
        return row.note
    return f"{row.value:.4g} {row.unit}" + (f" ({row.fraction:.0%} {row.limit})" if row.fraction is not None else "")
