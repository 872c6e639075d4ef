"""What is asked of the engine, and what it gives back."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import numpy as np

MOST_TEMPERATURE = 100.0
_LOG = logging.getLogger(__name__)


class Overloaded(RuntimeError):  # noqa: N818 - it says what is, not that somebody erred
    """No more requests are taken: as many wait as may, or the engine is ending."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: 0 takes the likeliest token, whatever the next three say.
        top_p: only the likeliest tokens that together have this probability; top_k: only so many of them, 0 for all.
        seed: the same seed brings the same random numbers, whatever else the engine does; None other ones every time.
        stop: the answer ends before the first of these strings.

    Raises:
        ValueError: a value out of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, fits, expected in (
            ("max_new_tokens", _is_whole(self.max_new_tokens, 1), "a whole number of 1 or more"),
            ("temperature", _is_number(self.temperature, MOST_TEMPERATURE), f"0 to {MOST_TEMPERATURE:g}"),
            ("top_p", _is_number(self.top_p, 1) and self.top_p > 0, "above 0, at most 1"),
            ("top_k", _is_whole(self.top_k, 0), "a whole number of 0 (all) or more"),
            ("seed", self.seed is None or _is_whole(self.seed), "a whole number or None"),
            ("stop", _are_texts(self.stop), "a tuple of strings that are not empty"),
        ):
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")


def _is_whole(value: object, least: int = -(2**63)) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_number(value: object, most: float) -> bool:
    return isinstance(value, int | float) and 0 <= value <= most


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(text, str) and text for text in value)


class Piece(NamedTuple):
    """A part of an answer. `text`: what is new; `tokens`: drawn so far in all; `finish`: None while it goes on, then
    "stop" (its end, or a stop string), "length", "cancelled" or "error" (`error` says which)."""

    text: str
    tokens: int
    finish: str | None
    error: str = ""


class Answer:
    """An answer that is being made. Iterate over its pieces, unless they are delivered elsewhere.

    Attributes:
        prompt_tokens: placeholders of pictures included. cached_tokens: of these, how many were not read again,
            because a state that had read them was there; known when the first piece comes.
    """

    def __init__(self, prompt_tokens: int, receiver: Callable[[Piece], None] | None) -> None:
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.cancelled = False
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._receiver = receiver or self._pieces.put
        self._taken = receiver is not None

    def deliver(self, piece: Piece) -> None:
        """Gives a piece to whoever asked. Who fails to take one is sent no more."""
        try:
            self._receiver(piece)
        except BaseException:  # of theirs; the engine's thread must go on
            self._receiver, self.cancelled = lambda piece: None, True
            _LOG.exception("the receiver of an answer failed")

    def cancel(self) -> None:
        """No more of it is wanted. A last piece still comes."""
        self.cancelled = True

    def __iter__(self) -> Iterator[Piece]:
        """The pieces as they come; once, and only where no receiver gets them."""
        if self._taken:
            raise ValueError("this answer's pieces go elsewhere: to its receiver, or to an earlier iteration")
        self._taken = True
        return self._come()

    def _come(self) -> Iterator[Piece]:
        while True:
            piece = self._pieces.get()
            yield piece
            if piece.finish is not None:
                return


@dataclass(frozen=True, eq=False)
class Picture:
    """uint8 pixels (3, H, W) as the processor scales them, what tells them from others, and where their placeholders
    stand in the prompt: `begin` up to `end`."""

    pixels: np.ndarray
    digest: bytes
    begin: int
    end: int


@dataclass(eq=False)
class Request:
    """One answer to be made. `read`: how many of `ids` and the answer the slot's state has read; `drawn`: the answer as
    far as it is known; `asked`: tokens that the device was told to draw, which it may still be doing."""

    ids: list[int]
    pictures: tuple[Picture, ...]
    sampling: Sampling
    answer: Answer
    slot: int = -1
    read: int = 0
    drawn: list[int] = field(default_factory=list)
    asked: int = 0

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.chance = Random(None if seed is None else str(seed))  # a number's sign would not count

    def next_stretch(self, most: int) -> tuple[int, tuple[Picture, ...]]:
        """Up to where the prompt is read next, and the pictures in between: to the end of the last picture, then to
        the end; at most about `most` tokens, but never into the middle of a picture."""
        last = self.pictures[-1].end if self.pictures else 0
        end = last if self.read < last else len(self.ids)
        end = min(end, self.read + most)
        for picture in self.pictures:
            if picture.begin < end < picture.end:
                end = picture.end
        if end == len(self.ids) - 1:  # a stretch of one token is not worth a turn
            end += 1
        return end, tuple(p for p in self.pictures if self.read <= p.begin < end)
