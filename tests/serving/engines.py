"""An engine of canned answers, and a server around an application, for tests of what lies between."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import uvicorn

from vlmamba.inference import Overloaded, Piece, Sampling


class CannedAnswer:
    """Says the words one by one on a thread of its own, until it is cancelled."""

    prompt_tokens = 7
    cached_tokens = 0

    def __init__(self, engine: CannedEngine, deliver: Callable[[Piece], None]) -> None:
        self.cached_tokens = 3
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._say, args=(engine, deliver), daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def _say(self, engine: CannedEngine, deliver: Callable[[Piece], None]) -> None:
        said = 0
        for word in engine.words:
            engine.go.wait(10)
            if self._cancelled.wait(engine.pause):
                deliver(Piece("", said, "cancelled"))
                return
            said += 1
            deliver(Piece(word, said, None))
        deliver(Piece("", said, *engine.end))


class CannedEngine:
    """Keeps what it is asked. `room`: answers before it is overloaded."""

    name = "canned"

    def __init__(self, words: Sequence[str] = ("a ", "red ", "square"), pause: float = 0.0, room: int = 99) -> None:
        self.words, self.pause, self.room = words, pause, room
        self.end: tuple[Any, ...] = ("stop",)
        self.refusal: Exception | None = None
        self.asked: list[tuple[list[dict[str, Any]], Sampling]] = []
        self.answers: list[CannedAnswer] = []
        self.go = threading.Event()
        self.go.set()

    def submit(
        self,
        messages: Sequence[dict[str, Any]],
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        deliver: Callable[[Piece], None] | None = None,
    ) -> CannedAnswer:
        assert deliver is not None
        if self.refusal is not None:
            raise self.refusal
        if len(self.answers) >= self.room:
            raise Overloaded("nobody more fits")
        self.asked.append((list(messages), sampling))
        self.answers.append(CannedAnswer(self, deliver))
        return self.answers[-1]

    def stats(self) -> dict[str, float]:
        return {"running": 1, "requests_total": float(len(self.asked))}

    def close(self) -> None:
        for answer in self.answers:
            answer.cancel()


@contextlib.contextmanager
def serving(app: Any) -> Iterator[httpx.Client]:
    """A client of the application behind a real server on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{door.getsockname()[1]}", timeout=20) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
