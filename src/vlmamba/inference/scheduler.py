"""Who is answered when: first come, first served, as slots become free. Nothing is ever taken from a slot that is at
work, since no answer needs more memory than when it began."""

from __future__ import annotations

import threading
from collections import deque

from vlmamba.inference.request import Overloaded, Request


class Scheduler:
    """Requests that wait and the slots of those that do not.

    `submit` is called from any thread, everything else from the engine's own.

    Args:
        slots: answers made at once. waiting: requests that may wait for one.
    """

    def __init__(self, slots: int, waiting: int) -> None:
        self.slots, self.most_waiting = slots, waiting
        self.active: list[Request] = []
        self._free = list(reversed(range(slots)))
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self.closed = False

    def submit(self, request: Request) -> None:
        """Puts a request into the line.

        Raises:
            Overloaded: the line is as long as it may be, or closed.
        """
        with self._changed:
            if self.closed:
                raise Overloaded("the engine is closed")
            if len(self._waiting) >= self.most_waiting:
                raise Overloaded(f"{len(self.active)} answers are being made and {len(self._waiting)} requests wait")
            self._waiting.append(request)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Takes no more requests."""
        with self._changed:
            self.closed = True
            self._changed.notify()

    def wait(self) -> None:
        """Returns when there is something to do, or the line is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self.active or self.closed)

    def admit(self) -> tuple[list[Request], list[Request]]:
        """Gives free slots to those who wait longest, and tells who no longer wants an answer and was let go."""
        with self._changed:
            gone = [request for request in self._waiting if request.answer.cancelled]
            for request in gone:
                self._waiting.remove(request)
            admitted = []
            while self._waiting and self._free:
                request = self._waiting.popleft()
                request.slot = self._free.pop()
                admitted.append(request)
            self.active += admitted
        return admitted, gone

    def defer(self, request: Request) -> None:
        """Puts a request behind all others that have a slot."""
        self.active.remove(request)
        self.active.append(request)

    def release(self, request: Request) -> None:
        """Takes the slot of a request that is done."""
        self.active.remove(request)
        self._free.append(request.slot)

    def give_up(self, waiting: bool) -> list[Request]:
        """Those who have a slot, and if `waiting` those in the line too: they are forgotten."""
        with self._changed:
            gone = [*self.active, *(self._waiting if waiting else ())]
            self._free = list(reversed(range(self.slots)))
            self.active.clear()
            if waiting:
                self._waiting.clear()
        return gone
