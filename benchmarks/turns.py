"""What is measured when: each section in parts, the numbers that the project aims at first."""

from __future__ import annotations

import importlib
import inspect
import re
import time
from dataclasses import dataclass

from benchmarks.bench import Bench


@dataclass(frozen=True)
class Turn:
    """A part of a section ("marks", "more" or "last", see `Bench.part`), and the modules that measure it.

    Attributes:
        weight: about how many seconds it takes on an H200. The time left is shared in these proportions among what is
            left of the same part.
    """

    part: str
    section: str
    modules: tuple[str, ...]
    weight: float

    def take(self, bench: Bench, seconds: float) -> None:
        """Measures it in about so many seconds."""
        before, report = time.monotonic(), bench.report
        bench.begin(self.section, seconds, self.part)
        for name in self.modules:
            module = importlib.import_module(f"benchmarks.{name}")
            about = inspect.cleandoc(module.__doc__ or "").split("\n\nShapes")[0].split("\nLetters")[0]
            about = re.sub(r"\n\n(    python.*\n)+", "\n", about)
            if about not in report.about[self.section]:
                report.about[self.section] = f"{report.about[self.section]}\n\n{about}".strip()
            module.run(bench)
            bench.free()
        report.seconds[self.section] = round(report.seconds[self.section] + time.monotonic() - before, 1)

    def skip(self, bench: Bench) -> None:
        """The report says so, unless it has an earlier run's rows of this section."""
        if self.section in bench.begun:
            bench.begin(self.section, 0.0, self.part)
            bench.missing(WHAT[self.part], "all")


WHAT = {"marks": "the first numbers", "more": "wider sweeps and other peers", "last": "what takes a minute a number"}
TURNS = (
    Turn("marks", "ops", ("ops",), 15),
    Turn("marks", "decode", ("decode", "peer_decode"), 45),
    Turn("marks", "prefill", ("prefill",), 60),
    Turn("marks", "vlm", ("vlm",), 25),
    Turn("marks", "training", ("training",), 45),
    Turn("marks", "evaluation", ("evaluation",), 40),
    Turn("marks", "memory", ("memory",), 15),
    Turn("marks", "cpu", ("cpu",), 60),
    Turn("more", "decode", ("peer_decode",), 50),
    Turn("more", "prefill", ("prefill",), 55),
    Turn("more", "vlm", ("vlm",), 30),
    Turn("more", "memory", ("memory",), 40),
    Turn("more", "ops", ("ops",), 25),
    Turn("more", "block", ("block",), 15),
    Turn("more", "engine", ("engine",), 25),
    Turn("more", "evaluation", ("evaluation",), 25),
    Turn("last", "prefill", ("prefill",), 10),
    Turn("last", "decode", ("peer_decode",), 110),
    Turn("last", "vlm", ("vlm",), 100),
)
SECTIONS = tuple(dict.fromkeys(turn.section for turn in TURNS))
