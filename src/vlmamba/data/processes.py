"""Worker processes: how they start, how many fit, and how their progress is shown."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def context() -> Any:
    """A forked worker starts at once, with sources and tokenizer in memory. Only Linux forks safely."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(function: Callable[[Any], T], chunks: Sequence[Any], what: str, workers: int = 0) -> Iterator[T]:
    """`function` of every chunk, in their order, with a bar on stderr where that is a terminal.

    Args:
        function: travels to each process once, so it may hold much.
        workers: processes; 0 takes one per core, and a single chunk needs none.
    """
    if len(chunks) <= 1:
        yield from map(function, chunks)
        return
    with ProcessPoolExecutor(workers or cores(), context(), _prepare, (function,)) as pool:
        yield from _progress(pool.map(_call, chunks), len(chunks), what)


_function: Callable[[Any], Any] | None = None  # of this worker process


def _prepare(function: Callable[[Any], Any]) -> None:
    global _function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _function = function


def _call(chunk: Any) -> Any:
    assert _function is not None
    return _function(chunk)


def _progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track

    console = Console(file=sys.stderr)
    yield from track(items, what, total, console=console, transient=True, disable=not console.is_terminal)
