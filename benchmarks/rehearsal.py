"""Kernels are compiled before anything is timed: every section in a process of its own, all at once, on models of two
layers and the widths and lengths of the real ones. What they compile lies on the disk then, where the run finds it.

One process after the other would compile for minutes, of the time that the sections have for measuring.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.bench import Bench
from benchmarks.report import Report
from benchmarks.turns import Turn

COMMAND = ("-m", "benchmarks", "--rehearse")
NOT_REHEARSED = ("memory", "cpu")  # the kernels of prefill; none
PATIENCE = 90.0  # seconds; what is not compiled then compiles while it is measured
LAYERS = 2
THREADS = 2


@contextmanager
def of(sections: Sequence[str]) -> Iterator[None]:
    """Rehearses sections while the body runs, and waits for the end of that, not for ever."""
    until = time.monotonic() + PATIENCE
    with tempfile.TemporaryDirectory() as folder, ExitStack() as logs:
        running = {}
        for section in sections:
            if section not in NOT_REHEARSED:
                log = logs.enter_context((Path(folder) / f"{section}.log").open("w+", encoding="utf-8"))
                running[section] = subprocess.Popen(
                    [sys.executable, *COMMAND, "--only", section, "--out", str(Path(folder) / section)],
                    env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        try:
            yield
            for section, process in running.items():
                _await(section, process, until)
        finally:
            for process in running.values():
                if process.poll() is None:
                    process.kill()
                process.wait()


def _await(section: str, process: subprocess.Popen[bytes], until: float) -> None:
    try:
        code = process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        print(f"the rehearsal of {section} is not over after {PATIENCE:.0f} s; its kernels compile later", flush=True)
    else:
        if code:
            print(f"the rehearsal of {section} failed ({code}); its kernels compile later", flush=True)


def play(turns: Sequence[Turn], device: torch.device, out: Path) -> int:
    """What such a process does: all parts but the last, nothing for longer than it must."""
    models.WIDTHS["2.8b"] = (models.WIDTHS["2.8b"][0], LAYERS)
    limits = {"copy": 1e12, "product": 1e14}
    bench = Bench(Report(out, {}), device, device.type != "cuda", limits, rehearsal=True)
    for turn in turns:
        if turn.part != "last":
            turn.take(bench, PATIENCE)
    return 0
