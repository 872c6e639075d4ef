"""What a picture holds, patch by patch: classes for an encoder to learn, from marks that the renderer leaves.

Letters: F fields, P patches (rows x columns, row-major).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf

import numpy as np

from vlmamba.data.scenes.vocabulary import COLOURS, FILLS, SHAPES, SIZES, THINGS

CHARACTERS = tuple("abcdefghijklmnopqrstuvwxyz0123456789+-")
"""In lower case, as words are answered: a lone "c" and a "C" are one drawing in two sizes."""
BAR_ENDS = tuple(f"bar {value}" for value in range(1, 11))
NOTHING = ""
LINES = 16
"""Into so many rows and columns a picture is cut to tell where the middle of something is."""
MOST_COUNTED = 9
_LINES = (NOTHING, *(f"line {number}" for number in range(1, LINES + 1)))
_COUNTS = (NOTHING, *map(str, range(1, MOST_COUNTED)), f"{MOST_COUNTED} or more")
_OBJECTS = (NOTHING, *THINGS, *SHAPES)
FIELDS: dict[str, tuple[str, ...]] = {
    "what": (NOTHING, *THINGS, *SHAPES, "patch", "bar", *BAR_ENDS, *CHARACTERS),
    "next": (NOTHING, *CHARACTERS),
    "colour": (NOTHING, *COLOURS),
    "fill": (NOTHING, *FILLS),
    "size": (NOTHING, *SIZES),
    "centre": (NOTHING, "here"),
    "row": _LINES,
    "column": _LINES,
    "named": _COUNTS,
    "coloured": _COUNTS,
    "filled": _COUNTS,
    "left": _OBJECTS,
    "right": _OBJECTS,
    "above": _OBJECTS,
    "below": _OBJECTS,
    "nearest": _OBJECTS,
}
"""Classes of each field of a patch; class 0 is that there is nothing of the kind.

`what`: the topmost thing, shape, patch of colour or bar over the middle of the patch, or whatever has its own middle in
it: an item, a character, the end of a bar, which tells the bar's value. `next`: the second character with its middle
here, in reading order. `colour` (of text: its ink), `fill`, `size`: of the same, where the world has a word for it.
`centre`: the middle of an item or a character, or a bar's end, is here. `row`, `column`: where the middle of that is of
which the patch is a part. `named`: how many things or shapes of its name are in the picture; `coloured`, `filled`: how
many shapes of its colour, or its fill."""

_NUMBERS = {field: {name: number for number, name in enumerate(names)} for field, names in FIELDS.items()}
_WHAT, _NEXT, _CENTRE, _ROW, _COLUMN = (
    list(FIELDS).index(field) for field in ("what", "next", "centre", "row", "column")
)
_COUNTED = {"what": "named", "colour": "coloured", "fill": "filled"}
_COUNTED_AT = [(field, list(FIELDS).index(counted)) for field, counted in _COUNTED.items()]
_NEIGHBOURS = slice(list(FIELDS).index("left"), len(FIELDS))


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
    def middle(self) -> tuple[float, float]:
        """x, y in pixels of the picture."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def is_object(self) -> bool:
        """Whether it is a thing or a shape, which can be counted."""
        return self.what in THINGS or self.what in SHAPES


@cache
def _named_classes(what: str, colour: str, fill: str, size: str) -> np.ndarray:
    said = {"what": what, "colour": colour, "fill": fill, "size": size}
    return np.array([numbers[said.get(field, NOTHING)] for field, numbers in _NUMBERS.items()])


def _classes(marks: Sequence[Mark], side: int) -> list[np.ndarray]:
    """(F,) of each mark, with `next` and `centre` left at nothing."""
    counts = Counter(
        (field, name) for mark in marks if mark.is_object for field in _COUNTED if (name := getattr(mark, field))
    )
    objects = [(number, *mark.middle) for number, mark in enumerate(marks) if mark.is_object]
    classes = [_named_classes(mark.what, mark.colour, mark.fill, mark.size).copy() for mark in marks]
    for number, mark in enumerate(marks):
        for at, middle in zip((_COLUMN, _ROW), mark.middle, strict=True):
            classes[number][at] = 1 + min(max(int(middle * LINES / side), 0), LINES - 1)
    for number, x, y in objects:
        for field, at in _COUNTED_AT:
            classes[number][at] = min(counts[field, getattr(marks[number], field)], MOST_COUNTED)
        classes[number][_NEIGHBOURS] = [
            0 if other is None else _NUMBERS["left"][marks[other].what] for other in _neighbours(number, x, y, objects)
        ]
    return classes


def _neighbours(number: int, x: float, y: float, objects: list[tuple[int, float, float]]) -> list[int | None]:
    """Of the object `number` at x, y: the nearest to its left and right, above and below it, and the nearest of all."""
    found: list[int | None] = [None] * 5
    least = [inf] * 5
    for other, other_x, other_y in objects:
        if other == number:
            continue
        across, down = other_x - x, other_y - y
        distance = across * across + down * down
        sides = [4]
        if abs(across) >= 2 * abs(down):
            sides.append(int(across > 0))
        elif abs(down) >= 2 * abs(across):
            sides.append(2 + (down > 0))
        for side in sides:
            if distance < least[side]:
                found[side], least[side] = other, distance
    return found


def patch_classes(marks: Iterable[Mark], side: int, rows: int, columns: int) -> np.ndarray:
    """Classes (F, P) int64 of the patches of a picture of `side` by `side` pixels, cut into `rows` by `columns`.

    Marks are in the order of drawing, so that later ones hide earlier ones; a middle is told also where it is hidden.
    """
    marks = list(marks)
    classes = _classes(marks, side)
    found = np.zeros((len(FIELDS), rows, columns), np.int64)
    ys, xs = _middles(side, rows), _middles(side, columns)
    for mark, named in zip(marks, classes, strict=True):
        if mark.cover is None:
            continue
        left, top = int(mark.box[0]), int(mark.box[1])
        height, width = mark.cover.shape
        r0, r1 = bisect_left(ys, top), bisect_left(ys, top + height)
        c0, c1 = bisect_left(xs, left), bisect_left(xs, left + width)
        if r0 < r1:
            covered = mark.cover[[[y - top] for y in ys[r0:r1]], [x - left for x in xs[c0:c1]]]
            np.copyto(found[:, r0:r1, c0:c1], named[:, None, None], where=covered)
    for mark, named in zip(marks, classes, strict=True):
        if mark.centred:
            x, y = mark.middle
            row, column = int(y * rows / side), int(x * columns / side)
            if 0 <= row < rows and 0 <= column < columns:
                _centre(found[:, row, column], named)
    return found.reshape(len(FIELDS), rows * columns)


@cache
def _middles(side: int, count: int) -> tuple[int, ...]:
    """The pixels in the middle of each of `count` patches in a row."""
    return tuple(int((i + 0.5) * side / count) for i in range(count))


def _centre(patch: np.ndarray, classes: np.ndarray) -> None:
    """Notes a middle in its patch (F,), beside a character's that is there before it."""
    second = _NUMBERS["next"].get(FIELDS["what"][classes[_WHAT]])
    if second and patch[_CENTRE] and FIELDS["what"][patch[_WHAT]] in _NUMBERS["next"]:
        if not patch[_NEXT]:
            patch[_NEXT] = second
        return
    patch[:] = classes
    patch[_CENTRE] = 1
