"""What a run tells: one line per interval, metrics.jsonl, a progress bar, TensorBoard events where installed."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlmamba.training.step import StepResult


@dataclass(frozen=True)
class Line:
    """One interval of training.

    Attributes:
        loss: token-weighted mean over the interval; grad_norm: mean over its steps, before clipping.
        lr: factor on the peak rates of the recipe, from 0 to 1.
        tokens_per_second, images_per_second: of all processes, padding not counted.
        padding: share of the positions that were padding.
        data_wait: share of the time that the device waited for data.
        step_ms: wall time of a step; memory_gb: peak on the device so far.
        eta_s: seconds left, by the pace of the whole run.
    """

    step: int
    progress: float
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    images_per_second: float
    padding: float
    data_wait: float
    step_ms: float
    memory_gb: float
    skipped: int
    elapsed_s: float
    eta_s: float

    def __str__(self) -> str:
        return (
            f"step {self.step} ({self.progress:.1%})  loss {self.loss:.4f}  lr x{self.lr:.3f}  "
            f"grad {self.grad_norm:.3f}  {self.tokens_per_second:,.0f} tok/s  {self.images_per_second:,.0f} img/s  "
            f"{self.step_ms:.0f} ms/step  data wait {self.data_wait:.1%}  padding {self.padding:.0%}  "
            f"mem {self.memory_gb:.1f} GB  eta {_clock(self.eta_s)}"
        )


class Interval:
    """Adds up the steps between two log lines."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.results: list[StepResult] = []
        self.waited = 0.0

    def add(self, result: StepResult, waited: float) -> None:
        self.results.append(result)
        self.waited += waited

    def line(
        self, step: int, progress: float, lr: float, skipped: int, elapsed: float, eta: float, device: torch.device
    ) -> Line:
        labels = torch.tensor([r.tally.labels for r in self.results], dtype=torch.float64)
        losses, norms = torch.tensor([r.read() for r in self.results], dtype=torch.float64).unbind(1)
        seconds = max(time.perf_counter() - self.started, 1e-9)
        tokens, slots = sum(r.tally.tokens for r in self.results), sum(r.tally.slots for r in self.results)
        return Line(
            step=step,
            progress=progress,
            loss=float((losses * labels).sum() / labels.sum()),
            lr=lr,
            grad_norm=float(norms.mean()),
            tokens_per_second=tokens / seconds,
            images_per_second=sum(r.tally.images for r in self.results) / seconds,
            padding=1 - tokens / max(slots, 1),
            data_wait=min(1.0, self.waited / seconds),
            step_ms=1000 * seconds / len(self.results),
            memory_gb=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0,
            skipped=skipped,
            elapsed_s=elapsed,
            eta_s=eta,
        )


class Logger:
    """Writes log lines to the screen, to `metrics.jsonl` and to TensorBoard; draws the bar on a terminal.

    Args:
        main: whether this is the process that speaks for all; the others say and write nothing.
    """

    def __init__(self, folder: Path, name: str, tensorboard: bool, main: bool = True):
        self.file, self.main = folder / "metrics.jsonl", main
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        if self.console.is_terminal and main:
            columns = (TextColumn(name), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, TextColumn("{task.fields[status]}"), console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(name, total=1.0, status="")
        self.events: Any = _event_writer(folder / "tensorboard") if tensorboard and main else None

    def say(self, text: str) -> None:
        if self.main:
            self.console.print(text, markup=False)

    def advance(self, progress: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=progress)

    def log(self, line: Line) -> None:
        if not self.main:
            return
        self.say(str(line))
        with self.file.open("a") as handle:
            handle.write(json.dumps(asdict(line)) + "\n")
        if self.bar is not None:
            self.bar.update(self.task, completed=line.progress, status=f"loss {line.loss:.3f}")
        if self.events is not None:
            for name, value in asdict(line).items():
                if name != "step":
                    self.events.add_scalar(name, value, line.step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.events is not None:
            self.events.close()


def forget_after(file: Path, step: int) -> None:
    """Drops the lines after `step`, which a resumed run writes again, and a last one that was cut off by its death."""
    if file.exists():
        whole = [line for line in file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        file.write_text("".join(line + "\n" for line in kept))


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The log lines of a run."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _event_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
