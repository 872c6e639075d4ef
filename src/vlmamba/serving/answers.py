"""Answers under way: from the engine's thread to the event loop, cancelled when nobody waits for them any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from vlmamba.inference import Answer, Engine, Piece, Sampling
from vlmamba.serving.protocol import Usage


class Answers:
    """Several answers to one prompt. Made on the event loop, begun on any thread, listened to on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._answers: list[Answer] = []
        self._tokens: dict[int, int] = {}
        self._cancelled = False

    def begin(self, engine: Engine, messages: Sequence[dict[str, Any]], sampling: Sampling, count: int) -> None:
        """Hands them to the engine; the seed of each is one above the seed before.

        Raises:
            ValueError, Overloaded: as the engine does. Then none is made.
        """
        try:
            for index in range(count):
                seed = None if sampling.seed is None else sampling.seed + index
                answer = engine.submit(messages, replace(sampling, seed=seed), self._deliver(index))
                self._answers.append(answer)
        except BaseException:
            self.cancel()
            raise
        if self._cancelled:  # meanwhile
            self.cancel()

    def cancel(self) -> None:
        """No more is wanted; a last piece of each still comes."""
        self._cancelled = True
        for answer in self._answers:
            answer.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(index, piece) of all answers as they come, until each has had its last."""
        going = set(range(len(self._answers)))
        while going:
            index, piece = await self._queue.get()
            self._tokens[index] = piece.tokens
            if piece.finish is not None:
                going.discard(index)
            yield index, piece

    def usage(self) -> Usage:
        """Of what came so far, once a piece of every answer has."""
        return Usage(
            self._answers[0].prompt_tokens,
            min(answer.cached_tokens for answer in self._answers),
            sum(self._tokens.values()),
        )

    def _deliver(self, index: int) -> Callable[[Piece], None]:
        def deliver(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended, nobody listens
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

        return deliver
