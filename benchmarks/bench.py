"""What a section is given: the device, the time left, the machine's limits, and where its rows go."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.report import Report, Row, timed
from benchmarks.timing import Timing


class Bench:
    """The run of one section.

    Attributes:
        device: cuda or cpu. toy: tiny shapes, to try everything on any machine; the numbers mean nothing then.
        limits: the machine's measured limits: "copy" (bytes/s, read plus written), "product" (bf16 FLOP/s).
        wall: on a CPU, take the time of all cores by the wall clock too: it says something on a quiet machine only.
    """

    def __init__(self, report: Report, device: torch.device, toy: bool, limits: dict[str, float], wall: bool = False):
        self.report, self.device, self.toy, self.limits, self.wall = report, device, toy, limits, wall
        self.section, self._end = "", float("inf")

    def begin(self, section: str, seconds: float) -> None:
        self.section, self._end = section, time.monotonic() + seconds
        self.report.start(section)

    def left(self) -> float:
        """Seconds left of this section's budget."""
        return self._end - time.monotonic()

    def seconds(self, most: float) -> float:
        """What to spend on one measurement: `most`, less when the section's time runs out."""
        return 0.005 if self.toy else max(0.1, min(most, self.left() / 4))

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

    def missing(self, case: str, who: str, reason: str) -> None:
        """A row that says why this peer has no number."""
        self.add(case, who, "missing", note=reason)

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
