"""Worker processes: how they start, how many fit, and how their progress is shown."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def context() -> Any:
    """A forked worker starts at once, with sources and tokenizer in memory. Only Linux forks safely."""
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Passes the items on, with a bar on stderr where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(file=sys.stderr)
    yield from track(items, what, total, console=console, transient=True, disable=not console.is_terminal)
