"""The symbolic scene: what a picture holds, where, and the geometry that questions ask about.

Coordinates are pixels of a 128 x 128 picture, x to the right and y down; a renderer scales them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

SIDE = 128
MARGIN = 10  # centres closer than this along an axis are not told apart by a question
_EDGE = SIDE / 3
_PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
DIRECTIONS = ("left", "right", "above", "below")


@dataclass(slots=True, eq=False)
class Item:
    """One thing, shape, patch of colour or line of text.

    `kind` is "thing", "shape", "patch", "word", "number" or "sum"; `name` what it is called (text in lower case, `text`
    as it is drawn); `px` the longer side, or the font's size; `x, y` the centre; `row, column` its slot, -1 where none.
    """

    kind: str
    name: str
    colour: str = ""
    fill: str = "solid"
    size: str = ""
    px: int = 0
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0
    row: int = -1
    column: int = -1
    text: str = ""
    face: int = 0

    @property
    def written(self) -> bool:
        return self.kind in ("word", "number", "sum")

    @property
    def box(self) -> tuple[float, float, float, float]:
        """left, top, right, bottom"""
        w, h = self.width / 2, self.height / 2
        return self.x - w, self.y - h, self.x + w, self.y + h

    @property
    def place(self) -> str:
        """The ninth of the picture that holds the centre."""
        return _PLACES[min(2, int(self.y / _EDGE))][min(2, int(self.x / _EDGE))]

    @property
    def well_placed(self) -> bool:
        """Whether the centre stands at least 5 px inside its ninth of the picture."""
        x, y = self.x, self.y
        return abs(x - _EDGE) >= 5 and abs(x - 2 * _EDGE) >= 5 and abs(y - _EDGE) >= 5 and abs(y - 2 * _EDGE) >= 5


@dataclass(frozen=True, slots=True)
class Background:
    """`base` RGB, overlaid with `second` through a mask of `style` ("plain", "gradient", "noise", "texture")."""

    style: str
    base: tuple[int, int, int]
    second: tuple[int, int, int]
    variant: int


@dataclass(frozen=True, slots=True)
class Group:
    """What a counting question counts: a noun in the plural, and how many there are."""

    kind: str
    plural: str
    count: int
    example: Item

    @property
    def about(self) -> list[Item]:
        """The items a question on this group turns on: none where only a shape, a colour or a pattern is named."""
        return [self.example] if self.kind in ("pair", "thing") else []


@dataclass(frozen=True, slots=True)
class Table:
    """A grid of cells (the scene's items carry row and column). `keyed`: the first column names the row's second.
    `headed`: columns are lettered and rows numbered."""

    rows: int
    columns: int
    content: str
    keyed: bool = False
    headed: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars of 1 to 10 units. `labels` are words, letters, things, or the bars' colours (`labelled` says which)."""

    labelled: str
    labels: tuple[str, ...]
    colours: tuple[str, ...]
    values: tuple[int, ...]
    horizontal: bool
    face: int


def _items_of(*kinds: str) -> cached_property[list[Item]]:
    return cached_property(lambda scene: [i for i in scene.items if i.kind in kinds])


@dataclass
class Scene:
    """All that is in one picture. `kind`: "crowd", "rows", "free", "odd", "text", "table" or "chart"."""

    kind: str
    background: Background
    items: list[Item] = field(default_factory=list)
    groups: tuple[Group, ...] = ()
    odd: Item | None = None
    odd_in: str = ""
    table: Table | None = None
    chart: Chart | None = None
    panel: tuple[float, float, float, float] | None = None
    panel_colour: tuple[int, int, int] = (0, 0, 0)
    expression: tuple[int, str, int] | None = None
    grid: tuple[int, int] | None = None
    held_out: bool = False

    things = _items_of("thing")
    shapes = _items_of("shape")
    objects = _items_of("thing", "shape")
    words = _items_of("word")
    numbers = _items_of("number")

    @cached_property
    def counts(self) -> Counter[tuple[str, ...]]:
        """How often each description fits: ("thing", name), ("shape", name), ("colour", c), (c, shape), (size, shape),
        ("place", kind, place)."""
        count: Counter[tuple[str, ...]] = Counter()
        for item in self.items:
            count[item.kind, item.name] += 1
            count["place", item.place] += 1
            if item.kind == "shape":
                count["colour", item.colour] += 1
                count[item.colour, item.name] += 1
                count[item.size, item.name] += 1
            elif item.written:
                count["ink", item.kind, item.colour] += 1
        return count

    @cached_property
    def beside(self) -> dict[int, dict[str, Item]]:
        """For each item (by id) what stands to its left, right, above, below, where that is beyond doubt.

        In slots: the neighbour in the next slot. Elsewhere: the only item on that side, all others standing clearly
        not there.
        """
        if self.grid:
            slot = {(i.row, i.column): i for i in self.items}
            steps = (("left", 0, -1), ("right", 0, 1), ("above", -1, 0), ("below", 1, 0))
            return {
                id(i): {d: slot[i.row + r, i.column + c] for d, r, c in steps if (i.row + r, i.column + c) in slot}
                for i in self.items
            }
        return {id(i): self._alone_on_each_side(i) for i in self.items}

    def _alone_on_each_side(self, item: Item) -> dict[str, Item]:
        found: dict[str, Item] = {}
        others = [other for other in self.items if other is not item]
        on_sides = (
            [other for other in others if other.x < item.x],
            [other for other in others if other.x > item.x],
            [other for other in others if other.y < item.y],
            [other for other in others if other.y > item.y],
        )
        for direction, on_side in zip(DIRECTIONS, on_sides, strict=True):
            if len(on_side) == 1 and offset(on_side[0], item, direction) >= MARGIN:
                found[direction] = on_side[0]
        return found


def offset(one: Item, other: Item, direction: str) -> float:
    """How far the centre of `one` lies from that of `other` towards `direction`."""
    if direction in ("left", "right"):
        return one.x - other.x if direction == "right" else other.x - one.x
    return one.y - other.y if direction == "below" else other.y - one.y
