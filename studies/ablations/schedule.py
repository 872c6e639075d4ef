"""Tasks over processes: one a GPU or several, each doing one task after another, in the order of their importance."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from studies.ablations.plan import Study

Finished = Callable[[str], bool]


@dataclass(frozen=True)
class Task:
    """What is to be done, and which other tasks must have been done before."""

    name: str
    needs: tuple[str, ...] = ()


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

    def stop(self, now: bool = False) -> None:
        """Lets the process end; `now`: a run saves its state first, and goes on next time."""
        self.connection.close()
        if now:
            self.process.terminate()
        self.process.join(20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def serve(connection: Connection, study: Study, gpu: int | None) -> None:
    """The life of a worker. What tasks say goes to a file each."""
    os.setsid()  # signals for the whole group would reach it twice, and the second one ends a run unsaved
    if gpu is not None:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = given.split(",")[gpu] if given else str(gpu)
    from studies.ablations.work import execute  # only now: it loads torch

    while True:
        try:
            task: str = connection.recv()
        except EOFError:
            return
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
        connection.send(problem)


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
    left = [task for task in tasks if not finished(task.name)]
    if not left:
        return []
    workers = [Worker(study, gpu) for gpu in gpus[: len(left)]]
    began: dict[str, float] = {}
    wrong: list[str] = []
    total, done = len(left), 0
    try:
        while True:
            for worker in workers:
                if worker.task is None and (task := _next(left, finished, wrong)) is not None:
                    left.remove(task)
                    began[task.name] = time.monotonic()
                    worker.give(task.name)
            busy: dict[Any, Worker] = {worker.connection: worker for worker in workers if worker.task is not None}
            patience = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = wait(list(busy), patience) if busy else []
            if not ready:
                break  # nothing more can be done, or the time is over
            for worker in (busy[connection] for connection in ready):
                name = str(worker.task)
                problem = worker.take()
                done += 1
                wrong += [name] if problem else []
                took = time.monotonic() - began[name]
                where = "" if worker.gpu is None else f" on GPU {worker.gpu}"
                print(f"[{done}/{total}] {name}: {problem or 'done'}, {took:.0f} s{where}", flush=True)
    finally:
        for worker in workers:
            worker.stop(now=worker.task is not None)
    under_way = [worker.task for worker in workers if worker.task is not None]
    if under_way or left:
        print(f"for another sitting: {', '.join([*under_way, *(task.name for task in left)])}", flush=True)
    return wrong


def _next(left: Sequence[Task], finished: Finished, wrong: Sequence[str]) -> Task | None:
    possible = (task for task in left if not set(task.needs) & set(wrong) and all(map(finished, task.needs)))
    return next(possible, None)
