"""Drawing names at random under the rules of a split: what may share a picture, what contrasts with its ground."""

from __future__ import annotations

from functools import cache
from random import Random

from vlmamba.data.scenes.scene import Background
from vlmamba.data.scenes.sprites import available_things
from vlmamba.data.scenes.vocabulary import (
    COLOURS,
    SHAPES,
    WRITTEN,
    held_out_pair,
    held_out_things,
    held_out_word,
)

_LIGHT = ((246, 244, 240), (226, 235, 246), (250, 240, 216), (222, 240, 224), (242, 226, 236), (206, 207, 212))
_DARK = ((58, 60, 72), (36, 60, 72), (70, 54, 62))
_STYLES = ("plain", "gradient", "noise", "texture")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LEAST_CONTRAST = 105.0


@cache
def contrasting(base: tuple[int, int, int]) -> tuple[str, ...]:
    """Names of the colours that stand out from `base`: at least 105 apart in RGB."""
    return tuple(
        name for name, rgb in COLOURS.items() if sum((a - b) ** 2 for a, b in zip(rgb, base)) >= _LEAST_CONTRAST**2
    )


@cache
def legible(base: tuple[int, int, int]) -> tuple[str, ...]:
    """Names of the colours in which text can be read on `base`: apart in brightness too."""
    return tuple(name for name in contrasting(base) if abs(_brightness(COLOURS[name]) - _brightness(base)) >= 45)


def _brightness(rgb: tuple[int, int, int]) -> float:
    return 0.3 * rgb[0] + 0.59 * rgb[1] + 0.11 * rgb[2]


@cache
def _pairs(base: tuple[int, int, int], held_out: bool) -> tuple[tuple[str, str], ...]:
    return tuple((c, s) for c in contrasting(base) for s in SHAPES if held_out_pair(c, s) == held_out)


@cache
def _words(held_out: bool) -> tuple[str, ...]:
    return tuple(w for w in WRITTEN if held_out_word(w) == held_out)


@cache
def partners(thing: str) -> tuple[str, ...]:
    """The things that never stand beside `thing` in training."""
    return tuple(t for t in available_things() if held_out_things(t, thing))


def draw_background(rng: Random) -> Background:
    base = rng.choice(_LIGHT) if rng.random() < 0.75 else rng.choice(_DARK)
    drift = rng.randint(-6, 6)
    base = (base[0] + drift, base[1] + drift, base[2] + drift)
    step = rng.choice((-1, 1)) * rng.randint(10, 22)
    second = tuple(max(0, min(255, v + step + rng.randint(-5, 5))) for v in base)
    return Background(rng.choice(_STYLES), base, second, rng.randrange(1 << 16))  # type: ignore[arg-type]


class Deck:
    """Draws for one picture. In training nothing held out is drawn; in the held-out split it is drawn on purpose."""

    def __init__(self, rng: Random, held_out: bool, base: tuple[int, int, int]) -> None:
        self.rng = rng
        self.held_out = held_out
        self.base = base
        self.things: list[str] = []
        self.taken: set[str] = set()

    def may_join(self, thing: str) -> bool:
        """Whether a thing not yet here may share the picture with those that are."""
        return thing not in self.things and (self.held_out or not any(held_out_things(thing, t) for t in self.things))

    def absent_thing(self) -> str:
        """A thing that is not in the picture but could be: drawn as the present ones are."""
        if self.held_out and self.things and self.rng.random() < 0.6:
            options = [t for t in partners(self.rng.choice(self.things)) if t not in self.things]
            if options:
                return self.rng.choice(options)
        everything = available_things()
        while True:
            name = self.rng.choice(everything)
            if self.may_join(name):
                return name

    def thing(self) -> str:
        """A new thing, which from now on is in the picture."""
        name = self.absent_thing()
        self.things.append(name)
        return name

    def ink(self) -> str:
        """A colour to write in."""
        return self.rng.choice(legible(self.base))

    def pair(self, colour: str = "", shape: str = "") -> tuple[str, str]:
        """A colour and a shape that may go together, one or the other given."""
        held_out = self.held_out and self.rng.random() < 0.6
        options = _pairs(self.base, held_out)
        if colour or shape:
            options = tuple(p for p in options if colour in ("", p[0]) and shape in ("", p[1]))
            if not options:  # the one pair of this colour or shape that is held out, on a ground that hides it
                return self.pair(colour, shape)
        return self.rng.choice(options)

    def pairs(self, held_out: bool) -> tuple[tuple[str, str], ...]:
        """All colours of shapes that stand out here, held out or not."""
        return _pairs(self.base, held_out)

    def word(self, shortest: int = 3, longest: int = 8) -> str:
        """A word not yet in the picture; one in five is a string of letters that means nothing."""
        while True:
            if self.rng.random() < 0.2 and shortest <= 5:
                length = self.rng.randint(max(2, min(shortest, 6)), min(6, longest))
                word = "".join(self.rng.choice(_LETTERS) for _ in range(length))
                if word in WRITTEN_SET or held_out_word(word) != self.held_out:
                    continue
            else:
                word = self.rng.choice(_words(self.held_out and self.rng.random() < 0.7))
            if shortest <= len(word) <= longest and word not in self.taken:
                self.taken.add(word)
                return word

    def letter(self) -> str:
        while True:
            letter = self.rng.choice(_LETTERS)
            if letter not in self.taken:
                self.taken.add(letter)
                return letter

    def number(self, lowest: int = 0, highest: int = 99) -> int:
        while True:
            number = self.rng.randint(lowest, highest)
            if str(number) not in self.taken:
                self.taken.add(str(number))
                return number


WRITTEN_SET = frozenset(WRITTEN)
