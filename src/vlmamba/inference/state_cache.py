"""States that have read a prompt's beginning, kept for the next prompt that begins so: a picture with its instructions,
or a conversation up to its last answer.

What a prefix costs does not depend on its length, so ten thousand tokens are kept as easily as ten.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

from vlmamba.inference.pool import States
from vlmamba.inference.request import Picture


class StateCache:
    """The states used last, of one sequence each, up to `most_bytes` together."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self._states: OrderedDict[bytes, tuple[int, States]] = OrderedDict()
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._states)

    def longest(self, ids: Sequence[int], pictures: Sequence[Picture]) -> tuple[int, States | None]:
        """The longest beginning of a prompt that a state has read, and the state, which must not be changed. The last
        token is never part of it: what follows is known only by reading it."""
        best, found = b"", 0
        for length, name in self._names(ids, pictures, [n for n in self._lengths if n < len(ids)]):
            if name in self._states:
                best, found = name, length
        if not found:
            return 0, None
        self._states.move_to_end(best)
        return found, self._states[best][1]

    def put(self, ids: Sequence[int], pictures: Sequence[Picture], nbytes: int, take: Callable[[], States]) -> None:
        """Keeps a state of `nbytes` that has read `ids`, which is taken only if it is not there and fits; those unused
        for longest make room."""
        [(length, name)] = self._names(ids, pictures, [len(ids)])
        if name in self._states:
            self._states.move_to_end(name)
        elif self.holds(nbytes):
            while self.nbytes + nbytes > self.most_bytes:
                self._drop()
            self._states[name] = length, take()
            self._lengths[length] += 1
            self.nbytes += nbytes

    def holds(self, nbytes: int) -> bool:
        """Whether a state of this size can be kept at all."""
        return nbytes <= self.most_bytes

    def halve(self) -> None:
        """Lets half of the states go."""
        for _ in range((len(self) + 1) // 2):
            self._drop()

    def _drop(self) -> None:
        _, (length, state) = self._states.popitem(last=False)
        self.nbytes -= state.nbytes
        self._lengths -= Counter([length])

    @staticmethod
    def _names(ids: Sequence[int], pictures: Sequence[Picture], lengths: list[int]) -> list[tuple[int, bytes]]:
        """What tells the first so many tokens from others: themselves, and the pictures among them."""
        digest, done, named = hashlib.sha256(), 0, []
        marks = sorted([(picture.begin, picture.digest) for picture in pictures] + [(n, b"") for n in set(lengths)])
        for place, shown in marks:
            digest.update(array("q", ids[done:place]).tobytes() + shown)
            done = place
            if not shown:
                named.append((place, digest.copy().digest()))
        return named
