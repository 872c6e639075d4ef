"""An answer's tokens as text, given out as soon as it is certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONGEST_CHARACTER = 4  # bytes, each of which may be a token; what is no character then never will be


class Writer:
    """Whole characters at a time, without the blank that begins every answer, and nothing of a stop string.

    Attributes:
        stopped: a stop string has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._undecoded: list[int] = []
        self._unsaid = ""
        self._begun = self.stopped = False

    def write(self, token: int) -> str:
        """What can be said now that this token is there."""
        self._undecoded.append(token)
        text = self._decoded()
        if text.endswith("\ufffd") and len(self._undecoded) < LONGEST_CHARACTER:  # the middle of a character
            return ""
        self._undecoded = []
        return self._say(text)

    def rest(self) -> str:
        """What was held back, now that no more comes."""
        text = "" if self.stopped else self._say(self._decoded()) + self._unsaid
        self._undecoded, self._unsaid = [], ""
        return text

    def _decoded(self) -> str:
        text: str = self._tokenizer.decode(
            self._undecoded, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _say(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip(" ")
            self._begun = bool(text)
        text = self._unsaid + text
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._unsaid = True, ""
            return text[: min(places)]
        # What may yet become a stop string is held back.
        longest = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._unsaid = text[len(text) - longest :]
        return text[: len(text) - longest]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
