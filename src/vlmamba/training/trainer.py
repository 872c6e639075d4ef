"""The loop around the step: data, schedule, log, checkpoints, signals."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch

from vlmamba.data.collate import Batch
from vlmamba.data.loading import Feed
from vlmamba.training.checkpoint import Checkpoints, Progress
from vlmamba.training.config import RunConfig
from vlmamba.training.curve import write_page
from vlmamba.training.metrics import Interval, Logger, forget_after, read_metrics
from vlmamba.training.optimizer import rate_at, set_rates
from vlmamba.training.step import Step, StepResult, Tally

INTERRUPTED = 75
"""Exit code of a run that was told to stop and saved its state (EX_TEMPFAIL: start it again and it goes on)."""

_USUAL = 50  # steps whose median loss a spike is measured by


class Interrupted(SystemExit):
    """SIGTERM or SIGINT came; a checkpoint was written. Exits with code 75 where nobody catches it."""

    def __init__(self, saved: Path):
        super().__init__(INTERRUPTED)
        self.saved = saved


class NonFiniteError(ValueError):
    """Loss or gradient became NaN or infinite; the batch was written to a file."""

    word = "nonfinite"


class SpikeError(NonFiniteError):
    """The loss rose far above that of the steps before; the batch was written to a file."""

    word = "spike"


class BadDataError(ValueError):
    """Too large a share of the samples could not be used."""


class Trainer:
    """Trains until the schedule ends, and can stop and go on at any step.

    Args:
        config: the run's recipe.
        step: what a step is.
        feed: micro-batches by step.
        folder: the run's folder.
        logger: where lines go.
    """

    def __init__(self, config: RunConfig, step: Step, feed: Feed, folder: Path, logger: Logger):
        self.config, self.step, self.feed, self.folder, self.logger = config, step, feed, folder, logger
        self.world = step.parallel.world
        self.progress = Progress()
        self.checkpoints = Checkpoints(
            folder / "checkpoints", config.checkpoint.keep, self.world, step.parallel.sharded
        )
        self.total_steps = config.optim.max_steps or feed.order.steps(config.optim.epochs)
        self._stop = threading.Event()
        self._rate = 0.0  # factor on the peak rates of the last step
        self._losses: deque[float] = deque(maxlen=_USUAL)
        self._unchecked: tuple[int, StepResult, list[Batch]] | None = None

    def resume(self) -> bool:
        """Takes up the newest whole checkpoint, if there is one."""
        found = self.checkpoints.load(self.step.model, self.step.optimizer)
        if found is not None:
            self.progress = found[1]
        if self.world.is_main:  # also where the run died before its first checkpoint
            forget_after(self.logger.file, self.progress.step)
            forget_after(self.folder / "skipped.jsonl", self.progress.step)
        if found is None:
            return False
        self.logger.say(f"going on from {found[0].name}")
        return True

    def train(self) -> None:
        """Runs to the end.

        Raises:
            Interrupted: after SIGTERM or SIGINT, state saved.
            NonFiniteError, BadDataError, CheckpointError: as they say.
        """
        started: float | None = None
        before = self.progress.seconds
        batches = self.feed.batches(self.progress.step)
        interval = Interval()
        restore = self._listen()
        try:
            while (share := self.share_done()) < 1.0:
                self._one_step(batches, share, interval)
                if started is None:  # what the first step takes, which compiles the kernels, is on no schedule
                    started = time.perf_counter()
                stopped = self._agree(before + time.perf_counter() - started)
                share = self.share_done()
                self.logger.advance(share)
                done, step = share >= 1.0 or stopped, self.progress.step
                if interval.results and (done or step % self.config.logging.every == 0):
                    self._log(interval, share)
                    interval = Interval()
                if share >= 1.0 and self.progress.samples == 0:
                    raise BadDataError(
                        f"none of the {self.progress.skipped} samples read could be used, so nothing was learned; "
                        f"{self.folder / 'skipped.jsonl'} has the reasons"
                    )
                if done or step % self.config.checkpoint.every == 0:
                    saved = self._save()
                    if stopped and share < 1.0:
                        self.checkpoints.wait()
                        self.logger.say(f"told to stop: saved {saved}; the same command goes on from there")
                        raise Interrupted(saved)
            self.checkpoints.wait()
            if self.progress.skipped:
                skipped = f"{self.progress.skipped} of {self.progress.samples + self.progress.skipped}"
                self.logger.say(f"left out: {skipped} samples; {self.folder / 'skipped.jsonl'} has the reasons")
        finally:
            restore()
            self.feed.close()
            self.checkpoints.settle()

    def _agree(self, seconds: float) -> bool:
        """Takes over the main process's clock; says whether any process was told to stop."""
        main = self.world.is_main
        self.progress.seconds, stops = self.world.sum([seconds if main else 0.0, float(self._stop.is_set())])
        return stops > 0

    def share_done(self) -> float:
        """From 0 to 1: by steps, or by time where there is a budget and it is further along."""
        by_steps = self.progress.step / self.total_steps
        budget = self.config.optim.time_budget
        return by_steps if budget is None else max(by_steps, self.progress.seconds / (60 * budget))

    def _one_step(self, batches: Iterator[list[Batch]], share: float, interval: Interval) -> None:
        waiting = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - waiting
        self.progress.step += 1
        tally = self.step.count(micro_batches)
        self.progress.samples += tally.samples
        self.progress.tokens += tally.tokens
        self.progress.skipped += tally.skipped
        self._report_skipped(micro_batches, tally)
        if tally.labels == 0:
            return  # every sample of it was bad; were there more such batches, the run would have been stopped
        # The rate is that of the step about to be made, so that the first and the last one move something.
        ahead = max(share, self.progress.step / (self.total_steps + 1))
        self._rate = rate_at(ahead, self.config.optim)
        set_rates(self.step.optimizer, self._rate)
        result = self.step(micro_batches, tally)
        interval.add(result, waited)
        self._check()
        self._unchecked = (self.progress.step, result, micro_batches)

    def _check(self) -> None:
        """Looks at the step before: its numbers are there by now, so the device need not wait."""
        if self._unchecked is None:
            return
        (step, result, micro_batches), self._unchecked = self._unchecked, None
        loss, norm = result.read()
        usual = median(self._losses) if len(self._losses) == self._losses.maxlen else math.inf
        kind: type[NonFiniteError]
        if math.isfinite(loss) and math.isfinite(norm):
            if self.config.optim.spike == 0 or loss <= self.config.optim.spike * usual:
                self._losses.append(loss)
                return
            problem, kind = f"the loss is {loss:.4g}, where {usual:.4g} was usual (optim.spike)", SpikeError
        else:
            problem, kind = f"loss {loss}, gradient norm {norm}", NonFiniteError
        rank = f"-rank-{self.world.rank}" if self.world.size > 1 else ""
        file = self.folder / f"{kind.word}-step-{step}{rank}.pt"
        torch.save([vars(batch) for batch in micro_batches], file)
        raise kind(
            f"step {step}: {problem}. The batch is in {file}; checkpoints "
            "hold a state before it. A lower learning rate, or a look at the samples named there, may help"
        )

    def _report_skipped(self, micro_batches: list[Batch], tally: Tally) -> None:
        reasons = [reason for batch in micro_batches for reason in batch.skipped]
        if reasons:
            with (self.folder / "skipped.jsonl").open("a") as handle:
                handle.writelines(json.dumps({"step": self.progress.step, "reason": r}) + "\n" for r in reasons)
        read = self.progress.samples + self.progress.skipped
        # A handful of bad samples at the start says nothing about the share.
        if tally.skipped and self.progress.skipped > max(10, self.config.max_bad_share * read):
            raise BadDataError(
                f"{self.progress.skipped} of {read} samples could not be used (most allowed: max_bad_share "
                f"{self.config.max_bad_share:.1%}); the last: {(reasons or ['another process has it'])[-1]}. "
                f"All are in {self.folder / 'skipped.jsonl'}"
            )

    def _log(self, interval: Interval, share: float) -> None:
        elapsed = time.perf_counter() - interval.started
        eta = (self.total_steps - self.progress.step) * elapsed / len(interval.results)
        if self.config.optim.time_budget:
            eta = min(eta, 60 * self.config.optim.time_budget - self.progress.seconds)
        notes = getattr(self.step.model, "notes", None)
        self.logger.log(
            interval.line(
                step=self.progress.step,
                progress=share,
                lr=self._rate,
                skipped=self.progress.skipped,
                elapsed=self.progress.seconds,
                eta=max(0.0, eta),
                device=self.step.device,
            )
        )
        if notes is not None:
            self.logger.say(notes())
        if self.step.captured is not None and (news := self.step.captured.note()) is not None:
            self.logger.say(news)

    def _save(self) -> Path:
        self._check()
        if self.world.is_main:
            write_page({self.folder.name: read_metrics(self.logger.file)}, self.folder / "curve.html")
        return self.checkpoints.save(self.step.model, self.step.optimizer, self.progress)

    def _listen(self) -> Any:
        """Has SIGTERM and SIGINT end the run after the current step; a second one ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            return lambda: None

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop.set()
            signal.signal(number, signal.SIG_DFL)

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}

        def restore() -> None:
            for number, handler in previous.items():
                signal.signal(number, handler)

        return restore
