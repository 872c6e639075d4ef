"""Threads that help the calling one through a token: asleep between tokens, never on the core of whom they help.

Linux may wake a thread on the very core that woke it and leave it there (seen: two threads side by side on one core of
two, for seconds). So a helper is told to stay off the caller's core before it is woken.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[int], None]  # told the number of its thread; the calling thread is number 0


class Helper(threading.Thread):
    """One thread, waiting for jobs."""

    def __init__(self, number: int) -> None:
        super().__init__(name=f"vlmamba-decode-{number}", daemon=True)
        self.number = number
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._cores: set[int] = set()
        self.start()

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            job(self.number)

    def keep_off(self, core: int) -> None:
        """Moves this thread to another core than this one, if it may use another."""
        cores = os.sched_getaffinity(0) - {core}
        if cores and cores != self._cores and self.native_id is not None:
            os.sched_setaffinity(self.native_id, cores)
            self._cores = cores


def run(job: Job, threads: int) -> None:
    """Wakes threads - 1 helpers for the job and does it on the calling thread. Returns when that one is through: a
    helper that was late finds nothing left to do."""
    if threads > 1:
        core = _current_core()
        for helper in _helpers(threads - 1, os.getpid()):
            if core is not None:
                helper.keep_off(core)
            helper.jobs.put(job)
    job(0)


@functools.lru_cache(maxsize=1)  # by process too: threads do not survive a fork
def _helpers(count: int, process: int) -> list[Helper]:
    helpers = [Helper(number) for number in range(1, count + 1)]
    atexit.register(_dismiss, helpers)
    return helpers


def _dismiss(helpers: list[Helper]) -> None:
    """Before the interpreter goes: a thread that it catches in the middle of a job takes the whole process down."""
    for helper in helpers:
        helper.jobs.put(None)
    for helper in helpers:
        helper.join(timeout=5)


def _current_core() -> int | None:
    return None if _sched_getcpu is None else _sched_getcpu()


def _find_sched_getcpu() -> Callable[[], int] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.PyDLL(None), "sched_getcpu", None)


_sched_getcpu = _find_sched_getcpu()


@functools.cache
def yield_address() -> int:
    """Address of the system's function that lets other threads run: int (*)(void)."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
