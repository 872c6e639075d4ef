"""Tasks over processes: one a GPU or several, each doing one task after another, in the order of their importance.

Several schedulers may work on one folder, started when they like: a worker locks a file for its task, the lock goes
with its process, and what is locked or finished is left to whom it belongs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from studies.ablations.plan import Study

Finished = Callable[[str], bool]
TAKEN = "taken"
"""A worker's answer where another scheduler's was a moment faster."""
GLANCE = 1.0
"""Seconds between two looks at what others have done."""


@dataclass(frozen=True)
class Task:
    """What is to be done, which other tasks must have been done before, and whether it is done only for others."""

    name: str
    needs: tuple[str, ...] = ()
    for_others: bool = False


class Worker:
    """A process that does tasks for one GPU (None: whatever device there is)."""

    def __init__(self, study: Study, gpu: int | None):
        self._study, self.gpu = study, gpu
        self.task: str | None = None
        self.start()

    def start(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, self._study, self.gpu))
        self.process.start()
        theirs.close()

    def give(self, task: str) -> None:
        self.task = task
        self.connection.send(task)

    def take(self) -> str | None:
        """What went wrong with its task; None: nothing."""
        self.task = None
        try:
            problem: str | None = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            problem = f"its process ended with code {self.process.exitcode}"
            self.start()
        return problem

    def tell(self) -> None:
        """The process shall end, now: a run saves its state first, and goes on next time."""
        self.connection.close()
        if self.task is not None:
            self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """Waits until the process that was told has ended."""
        self.process.join(20)
        if self.process.is_alive():
            self._signal(signal.SIGKILL)
            self.process.join()

    def _signal(self, number: int) -> None:
        """To the process and those that draw for it: it leads a group once it serves."""
        pid = self.process.pid
        assert pid is not None
        for send in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                send(pid, number)
                return


def serve(connection: Connection, study: Study, gpu: int | None) -> None:
    """The life of a worker. What tasks say goes to a file each."""
    os.setsid()  # a terminal's signals would reach it too, and a second one ends a run unsaved
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are many of them, and the GPU does the work
    if gpu is not None:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = given.split(",")[gpu] if given else str(gpu)
    from studies.ablations.work import execute, finished  # only now: it loads torch

    while True:
        try:
            task: str = connection.recv()
        except EOFError:
            return
        claim = lock(study.output, task)
        if claim is None or finished(study, task):
            connection.send(TAKEN)
            continue
        log = study.output / "logs" / f"{task}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        problem = None
        try:
            execute(study, task)
        except Exception as error:  # the next task may do better
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error} (see {log})"
        os.close(claim)
        connection.send(problem)


def lock(output: Path, task: str) -> int | None:
    """The open file that says that this process does the task; None where another one does."""
    file = _claim(output, task)
    try:
        os.lockf(file, os.F_TLOCK, 0)  # of this process alone: none that it forks holds it too
    except OSError:
        os.close(file)
        return None
    return file


def is_free(output: Path, task: str) -> bool:
    """Whether no other process does the task."""
    file = _claim(output, task)
    try:
        os.lockf(file, os.F_TEST, 0)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _claim(output: Path, task: str) -> int:
    folder = output / "claims"
    folder.mkdir(parents=True, exist_ok=True)
    return os.open(folder / task, os.O_RDWR | os.O_CREAT, 0o644)


def do_all(
    study: Study,
    tasks: Sequence[Task],
    finished: Finished,
    gpus: Sequence[int | None],
    deadline: float | None = None,
) -> list[str]:
    """Does every task that is not finished, the first that can be done first; returns those that went wrong.

    Args:
        gpus: of each worker.
        deadline: of `time.monotonic`. What is under way then is stopped, and goes on in another sitting.
    """
    left = open_tasks(tasks, finished)
    if not left:
        return []
    workers = [Worker(study, gpu) for gpu in gpus[: len(left)]]
    wrong: list[str] = []
    try:
        _work(study, left, finished, workers, deadline, wrong)
    finally:
        for worker in workers:
            worker.tell()
        for worker in workers:
            worker.stop()
    undone = [task.name for task in open_tasks(tasks, finished) if task.name not in wrong]
    if undone:
        print(f"for another sitting: {', '.join(undone)}", flush=True)
    return wrong


def _work(
    study: Study,
    left: list[Task],
    finished: Finished,
    workers: Sequence[Worker],
    deadline: float | None,
    wrong: list[str],
) -> None:
    """Gives out what is left until all is done, here or elsewhere, or cannot be, or the time is over."""
    began: dict[str, float] = {}
    total, done = len(left), 0
    while deadline is None or time.monotonic() < deadline:
        given = {worker.task for worker in workers}
        left = [task for task in open_tasks(left, finished) if task.name not in wrong]
        for worker in workers:
            if worker.task is None and (task := _next(study, left, given, finished, wrong)) is not None:
                given.add(task.name)
                began[task.name] = time.monotonic()
                worker.give(task.name)
        busy: dict[Any, Worker] = {worker.connection: worker for worker in workers if worker.task is not None}
        if not busy and all(is_free(study.output, task.name) for task in left):
            return  # nothing more can be done
        if not busy:
            time.sleep(GLANCE)
        patience = GLANCE if deadline is None else max(0.0, min(GLANCE, deadline - time.monotonic()))
        for worker in (busy[connection] for connection in wait(list(busy), patience)):
            name = str(worker.task)
            problem = worker.take()
            if problem == TAKEN:
                continue
            done += 1
            wrong += [name] if problem else []
            took = time.monotonic() - began[name]
            where = "" if worker.gpu is None else f" on GPU {worker.gpu}"
            print(f"[{done}/{total}] {name}: {problem or 'done'}, {took:.0f} s{where}", flush=True)


def open_tasks(tasks: Sequence[Task], finished: Finished) -> list[Task]:
    """Those not finished, without the data that nobody needs any more."""
    left = [task for task in tasks if not finished(task.name)]
    wanted = {need for task in left for need in task.needs}
    return [task for task in left if task.name in wanted or not task.for_others]


def _next(
    study: Study, left: Sequence[Task], given: set[str | None], finished: Finished, wrong: Sequence[str]
) -> Task | None:
    for task in left:
        possible = task.name not in given and not set(task.needs) & set(wrong) and all(map(finished, task.needs))
        if possible and is_free(study.output, task.name):
            return task
    return None
