"""What a picture holds, patch by patch: classes for an encoder to learn, from marks that the renderer leaves.

Letters: F fields, P patches (rows x columns, row-major).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from vlmamba.data.scenes.vocabulary import COLOURS, FILLS, SHAPES, SIZES, THINGS

CHARACTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789+-")
"""In lower case, as words are answered: a lone "c" and a "C" are one drawing in two sizes."""
BAR_ENDS = tuple(f"bar {value}" for value in range(1, 11))
NOTHING = ""
FIELDS: dict[str, tuple[str, ...]] = {
    "what": (NOTHING, *THINGS, *SHAPES, "patch", "bar", *BAR_ENDS, *CHARACTERS),
    "next": (NOTHING, *CHARACTERS),
    "colour": (NOTHING, *COLOURS),
    "fill": (NOTHING, *FILLS),
    "size": (NOTHING, *SIZES),
    "centre": (NOTHING, "here"),
}
"""Classes of each field of a patch; class 0 is that there is nothing of the kind.

`what`: the topmost thing, shape, patch of colour or bar over the middle of the patch, or whatever has its own middle in
it: an item, a character, the end of a bar, which tells the bar's value. `next`: the second character with its middle
here, in reading order. `colour` (of text: its ink), `fill`, `size`: of the same, where the world has a word for it.
`centre`: the middle of an item or a character, or a bar's end, is here."""

_NUMBERS = {field: {name: number for number, name in enumerate(names)} for field, names in FIELDS.items()}
_WHAT, _NEXT, _CENTRE = (list(FIELDS).index(field) for field in ("what", "next", "centre"))


@dataclass(frozen=True, slots=True)
class Mark:
    """One drawn thing, shape, patch of colour, bar, bar's end or character; `what` in the words of FIELDS.

    `box`: left, top, right, bottom in pixels of the picture. `cover`: which pixels from the box's corner on belong to
    it, (height, width) bool; None for what only its middle tells of. `centred`: its middle is one to be found.
    """

    what: str
    box: tuple[float, float, float, float]
    colour: str = NOTHING
    fill: str = NOTHING
    size: str = NOTHING
    cover: np.ndarray | None = None
    centred: bool = True

    @property
    def classes(self) -> np.ndarray:
        """(F,) int64 with `next` and `centre` left at nothing; not to be written to."""
        return _classes(self.what, self.colour, self.fill, self.size)


@cache
def _classes(what: str, colour: str, fill: str, size: str) -> np.ndarray:
    said = {"what": what, "colour": colour, "fill": fill, "size": size}
    return np.array([numbers[said.get(field, NOTHING)] for field, numbers in _NUMBERS.items()])


def patch_classes(marks: Iterable[Mark], side: int, rows: int, columns: int) -> np.ndarray:
    """Classes (F, P) int64 of the patches of a picture of `side` by `side` pixels, cut into `rows` by `columns`.

    Marks are in the order of drawing, so that later ones hide earlier ones; a middle is told also where it is hidden.
    """
    marks = list(marks)
    found = np.zeros((len(FIELDS), rows, columns), np.int64)
    ys, xs = _middles(side, rows), _middles(side, columns)
    for mark in marks:
        if mark.cover is None:
            continue
        left, top = int(mark.box[0]), int(mark.box[1])
        height, width = mark.cover.shape
        r0, r1 = bisect_left(ys, top), bisect_left(ys, top + height)
        c0, c1 = bisect_left(xs, left), bisect_left(xs, left + width)
        if r0 < r1:
            covered = mark.cover[[[y - top] for y in ys[r0:r1]], [x - left for x in xs[c0:c1]]]
            np.copyto(found[:, r0:r1, c0:c1], mark.classes[:, None, None], where=covered)
    for mark in marks:
        if mark.centred:
            x, y = (mark.box[0] + mark.box[2]) / 2, (mark.box[1] + mark.box[3]) / 2
            row, column = int(y * rows / side), int(x * columns / side)
            if 0 <= row < rows and 0 <= column < columns:
                _centre(found[:, row, column], mark)
    return found.reshape(len(FIELDS), rows * columns)


@cache
def _middles(side: int, count: int) -> tuple[int, ...]:
    """The pixels in the middle of each of `count` patches in a row."""
    return tuple(int((i + 0.5) * side / count) for i in range(count))


def _centre(patch: np.ndarray, mark: Mark) -> None:
    """Notes a middle in its patch (F,), beside a character's that is there before it."""
    second = _NUMBERS["next"].get(mark.what)
    if second and patch[_CENTRE] and FIELDS["what"][patch[_WHAT]] in _NUMBERS["next"]:
        if not patch[_NEXT]:
            patch[_NEXT] = second
        return
    patch[:] = mark.classes
    patch[_CENTRE] = 1
