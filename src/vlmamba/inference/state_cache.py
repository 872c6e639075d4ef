"""States that have read a prompt's beginning, kept for the next prompt that begins so: a picture with its instructions,
or a conversation up to its last answer.

What a prefix costs does not depend on its length, so ten thousand tokens are kept as easily as ten.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence

from vlmamba.inference.request import Picture
from vlmamba.models.state import MambaState


class StateCache:
    """The states used last, of one sequence each, up to `most_bytes` together."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self._states: OrderedDict[bytes, tuple[int, MambaState]] = OrderedDict()
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._states)

    def longest(self, ids: Sequence[int], pictures: Sequence[Picture]) -> tuple[int, MambaState | None]:
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

    def knows(self, ids: Sequence[int], pictures: Sequence[Picture]) -> bool:
        """Whether a state that has read just this is there."""
        return any(name in self._states for _, name in self._names(ids, pictures, [len(ids)]))

    def put(self, ids: Sequence[int], pictures: Sequence[Picture], state: MambaState) -> None:
        """Keeps a state that has read `ids`; those unused for longest make room. It is the cache's from now on."""
        [(length, name)] = self._names(ids, pictures, [len(ids)])
        if name in self._states or state.nbytes > self.most_bytes:
            return
        while self.nbytes + state.nbytes > self.most_bytes:
            _, (gone, old) = self._states.popitem(last=False)
            self.nbytes -= old.nbytes
            self._lengths -= Counter([gone])
        self._states[name] = length, state
        self._lengths[length] += 1
        self.nbytes += state.nbytes

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
