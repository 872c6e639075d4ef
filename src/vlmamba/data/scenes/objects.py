"""Composing pictures of things and shapes: crowds to count, rows to relate, free heaps, and one odd among its like."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin
from random import Random

from vlmamba.data.scenes.deck import WRITTEN_SET, Deck, draw_background
from vlmamba.data.scenes.scene import SIDE, Group, Item, Scene
from vlmamba.data.scenes.sprites import FACES, SHAPE_AREA, available_things, text_size, thing_ratio
from vlmamba.data.scenes.vocabulary import FILLS, SHAPES, SIZE_PX, SIZES, SMALLEST_THING, plural, written_size

_MOST = 6  # the highest count asked for
_HIDDEN = 0.22  # the part of an item that others may hide, by a bound that is never exceeded
_THING_AREA = 0.4


def new_thing(deck: Deck, name: str, sizes: tuple[str, ...] = SIZES) -> Item:
    size = deck.rng.choice(sizes)
    low, high = SIZE_PX[size]
    px = deck.rng.randint(max(low, SMALLEST_THING), high + (size == "small"))
    width, height = thing_ratio(name)
    return Item("thing", name, size=size, px=px, width=width * px, height=height * px)


def new_shape(deck: Deck, colour: str, shape: str, sizes: tuple[str, ...] = SIZES, fill: str = "") -> Item:
    """Small shapes are solid (a pattern would not be seen); the others have any fill."""
    size = deck.rng.choice(sizes)
    px = deck.rng.randint(*SIZE_PX[size])
    fill = fill or ("solid" if size == "small" else deck.rng.choice(FILLS))
    return Item("shape", shape, colour, fill, size, px, width=px, height=px)


def new_text(deck: Deck, kind: str, name: str, colour: str, px: int, face: int | None = None) -> Item:
    """A line of text in one of three ways of writing it."""
    written = (name, name, name.upper(), name.capitalize())
    # A capital I and a small l look alike: what is no word has one case throughout, and a lone one its own.
    text = {"i": "i", "l": "L"}.get(name) or deck.rng.choice(written if name in WRITTEN_SET else written[:3])
    face = deck.rng.randrange(FACES) if face is None else face
    width, height = text_size(text, face, px)
    size = written_size(px)
    return Item(kind, name, colour, size=size, px=px, width=width, height=height, text=text, face=face)


def any_object(deck: Deck, sizes: tuple[str, ...] = SIZES) -> Item:
    if available_things() and deck.rng.random() < 0.5:
        return new_thing(deck, deck.thing(), sizes)
    return new_shape(deck, *deck.pair(), sizes)


def _distinct(deck: Deck, count: int, sizes: tuple[str, ...]) -> list[Item]:
    """Things all different, shapes all of different colour or kind."""
    items: list[Item] = []
    seen: set[tuple[str, str]] = set()
    while len(items) < count:
        item = any_object(deck, sizes)
        if item.kind == "thing" or (item.colour, item.name) not in seen:
            seen.add((item.colour, item.name))
            items.append(item)
    return items


def in_slots(rng: Random, items: list[Item], rows: int, columns: int) -> None:
    """Put each item into a slot of its own, a little off its middle."""
    slots = [(r, c) for r in range(rows) for c in range(columns)]
    rng.shuffle(slots)
    cell_w, cell_h = (SIDE - 2) / columns, (SIDE - 2) / rows
    for item, (row, column) in zip(items, slots):
        free_x = min(5.0, max(0.0, (cell_w - item.width) / 2 - 0.5))
        free_y = min(5.0, max(0.0, (cell_h - item.height) / 2 - 0.5))
        item.row, item.column = row, column
        item.x = round(1 + cell_w * (column + 0.5) + rng.uniform(-free_x, free_x))
        item.y = round(1 + cell_h * (row + 0.5) + rng.uniform(-free_y, free_y))


def _clash(item: Item, placed: list[Item], hidden: list[float], overlap: bool) -> dict[int, float] | None:
    """What `item` would hide of each placed one, or None when that is too much."""
    left, top, right, bottom = item.box
    more: dict[int, float] = {}
    for index, other in enumerate(placed):
        a, b, c, d = other.box
        wide, high = min(right, c) - max(left, a), min(bottom, d) - max(top, b)
        if wide <= -2 or high <= -2:
            continue
        if not overlap or item.written or other.written or item.kind == other.kind == "shape":
            return None
        area = SHAPE_AREA[other.name] if other.kind == "shape" else _THING_AREA
        part = max(0.0, wide) * max(0.0, high) / (area * other.width * other.height)
        if other.fill == "outlined" or hidden[index] + part > _HIDDEN:
            return None
        more[index] = part
    return more


def at_large(rng: Random, items: list[Item], overlap: bool) -> bool:
    """Place items anywhere, the larger first and so behind; False where they do not fit."""
    items.sort(key=lambda i: -i.px)
    placed: list[Item] = []
    hidden: list[float] = []
    for item in items:
        w, h = item.width / 2 + 1, item.height / 2 + 1
        touching = rng.choice(placed) if overlap and placed and rng.random() < 0.6 else None
        for attempt in range(40):
            item.x, item.y = round(rng.uniform(w, SIDE - w)), round(rng.uniform(h, SIDE - h))
            if touching and attempt < 12:
                turn, reach = rng.uniform(0, 2 * pi), 0.4 * (touching.px + item.px)
                item.x = round(min(SIDE - w, max(w, touching.x + reach * cos(turn))))
                item.y = round(min(SIDE - h, max(h, touching.y + reach * sin(turn))))
            more = _clash(item, placed, hidden, overlap)
            if more is not None:
                break
        else:
            return False
        for index, part in more.items():
            hidden[index] += part
        placed.append(item)
        hidden.append(0.0)
    return True


def compose_rows(rng: Random, held_out: bool) -> Scene:
    """Five to nine different objects in loose rows and columns."""
    background = draw_background(rng)
    deck = Deck(rng, held_out, background.base)
    rows, columns, sizes = rng.choice(((3, 3, SIZES), (3, 3, SIZES), (3, 4, SIZES[:2]), (4, 3, SIZES[:2])))
    items = _distinct(deck, rng.randint(5, 9), sizes)
    if rng.random() < 0.25:
        items[-1] = _small_text(deck, 124 / columns)
    in_slots(rng, items, rows, columns)
    return Scene("rows", background, items, grid=(rows, columns), held_out=held_out)


def _small_text(deck: Deck, room: float) -> Item:
    while True:
        if deck.rng.random() < 0.6:
            item = new_text(deck, "word", deck.word(3, 5), deck.ink(), deck.rng.randint(13, 16))
        else:
            item = new_text(deck, "number", str(deck.number()), deck.ink(), deck.rng.randint(14, 26))
        if item.width < room - 2:
            return item


def compose_free(rng: Random, held_out: bool) -> Scene:
    """Three to eight different objects anywhere, in two pictures of five overlapping a little."""
    background = draw_background(rng)
    deck = Deck(rng, held_out, background.base)
    count = rng.choice((1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8))
    items = _distinct(deck, count, SIZES)
    if rng.random() < 0.3:
        items[rng.randrange(count)] = _small_text(deck, 60)
    scene = Scene("free", background, items, held_out=held_out)
    overlap = rng.random() < 0.4
    if not any(at_large(rng, items, overlap) for _ in range(3)):
        in_slots(rng, items, 3, 3)
        scene.grid = (3, 3)
    return scene


def compose_odd(rng: Random, held_out: bool) -> Scene:
    """Four to nine of a kind, one of which differs in one thing; what else varies, varies for all."""
    background = draw_background(rng)
    deck = Deck(rng, held_out, background.base)
    count = rng.randint(4, 9)
    kinds = ("shape", "colour", "size", "pattern", "thing", "thing") if available_things() else ("shape", "colour")
    odd_in = rng.choice(kinds)
    if odd_in == "thing":
        one, other = deck.thing(), deck.thing()
        items = [new_thing(deck, one if i else other) for i in range(count)]
    else:
        items = _odd_shapes(deck, odd_in, count)
    scene = Scene("odd", background, items, odd=items[0], odd_in=odd_in, grid=(3, 3), held_out=held_out)
    in_slots(rng, items, 3, 3)
    return scene


def _odd_shapes(deck: Deck, odd_in: str, count: int) -> list[Item]:
    """Shapes of which the first differs; the colour or the kind may vary among all where it is not what differs."""
    rng = deck.rng
    colour, shape = deck.pair()
    if odd_in == "shape":
        other = _other(lambda: deck.pair(colour=colour)[1], shape)
        loose = rng.random() < 0.5
        pairs = [deck.pair(shape=shape) if loose else (colour, shape) for _ in range(count)]
        pairs[0] = deck.pair(shape=other) if loose else (colour, other)
    elif odd_in == "colour":
        other = _other(lambda: deck.pair(shape=shape)[0], colour)
        loose = rng.random() < 0.5
        pairs = [deck.pair(colour=colour) if loose else (colour, shape) for _ in range(count)]
        pairs[0] = deck.pair(colour=other) if loose else (other, shape)
    else:
        pairs = [(colour, shape)] * count
    if odd_in == "size":
        big, small = rng.sample(("small", "large"), 2)
        return [new_shape(deck, c, s, (small if i else big,), "solid") for i, (c, s) in enumerate(pairs)]
    if odd_in == "pattern":
        one, two = rng.sample(FILLS, 2)
        same = (rng.choice(SIZES[1:]),)
        return [new_shape(deck, c, s, same, one if i else two) for i, (c, s) in enumerate(pairs)]
    fill, size = rng.choice(FILLS), rng.choice(SIZES[1:])
    return [new_shape(deck, c, s, (size,), fill) for c, s in pairs]


def _other(draw: Callable[[], str], taken: str) -> str:
    while (name := draw()) == taken:
        pass
    return name


def compose_crowd(rng: Random, held_out: bool) -> Scene:
    """Two groups to count, each 0 to 6, equally many in half of the pictures, and a few others."""
    background = draw_background(rng)
    deck = Deck(rng, held_out, background.base)
    one = rng.randint(0, _MOST)
    two = one if rng.random() < 0.5 else rng.choice([n for n in range(_MOST + 1) if n != one])
    rest = rng.randint(2, 4) if one + two < 8 else rng.randint(0, 2)
    small = one + two + rest > 9
    sizes = SIZES[:2] if small else SIZES
    kinds = ("pair",) if held_out else ("shape", "colour", "pair", "pattern")
    kind = rng.choice((*kinds, "thing", "thing") if available_things() else kinds)
    groups, members = _groups(deck, kind, (one, two), sizes)
    names = {(g.example.colour, g.example.name) for g in groups}
    strangers: list[Item] = []
    while len(strangers) < rest:
        item = any_object(deck, sizes)
        if not _belongs(item, kind, groups) and (item.colour, item.name) not in names:
            names.add((item.colour, item.name))
            strangers.append(item)
    items = members + strangers
    rng.shuffle(items)
    grid = (4, 4) if small else (3, 3)
    in_slots(rng, items, *grid)
    return Scene("crowd", background, items, groups=groups, grid=grid, held_out=held_out)


def _belongs(item: Item, kind: str, groups: tuple[Group, ...]) -> bool:
    """Whether `item` would be counted in one of the groups."""
    if kind == "thing":
        return any(item.name == g.example.name for g in groups)
    if item.kind != "shape":
        return False
    if kind == "shape":
        return any(item.name == g.example.name for g in groups)
    if kind == "colour":
        return any(item.colour == g.example.colour for g in groups)
    if kind == "pattern":
        return any(item.fill == g.example.fill for g in groups)
    return any((item.colour, item.name) == (g.example.colour, g.example.name) for g in groups)


def _groups(
    deck: Deck, kind: str, counts: tuple[int, int], sizes: tuple[str, ...]
) -> tuple[tuple[Group, ...], list[Item]]:
    """Two groups of a kind and their members."""
    groups, members, taken = [], [], set()
    for count in counts:
        while True:
            colour, shape = deck.pair()
            fill = deck.rng.choice(FILLS)
            name = {"shape": shape, "colour": colour, "pair": f"{colour} {shape}", "pattern": fill}.get(kind, "")
            if kind == "thing":
                name = deck.thing()
            if name not in taken:
                taken.add(name)
                break
        if kind == "thing":
            made = [new_thing(deck, name, sizes) for _ in range(count + 1)]
        elif kind == "shape":
            made = [new_shape(deck, *deck.pair(shape=name), sizes) for _ in range(count + 1)]
        elif kind == "colour":
            made = [new_shape(deck, *deck.pair(colour=name), sizes) for _ in range(count + 1)]
        elif kind == "pair":
            made = [new_shape(deck, colour, shape, sizes) for _ in range(count + 1)]
        else:
            made = [new_shape(deck, *deck.pair(), sizes[1:], name) for _ in range(count + 1)]
        noun = name + " shape" if kind in ("colour", "pattern") else name
        groups.append(Group(kind, plural(noun), count, made[0]))
        members += made[1:]
    return tuple(groups), members


def absent_pairs(scene: Scene, deck: Deck) -> list[tuple[str, str]]:
    """Colours of shapes that are not in the picture but could be; held-out ones where the scene is."""
    present = {(i.colour, i.name) for i in scene.shapes}
    return [pair for pair in deck.pairs(scene.held_out) if pair not in present]


def absent_shape(rng: Random, scene: Scene, deck: Deck) -> tuple[str, str] | None:
    """One of these; outside the held-out split in half of the cases with its colour and its shape there apart."""
    absent = absent_pairs(scene, deck)
    if not scene.held_out and rng.random() < 0.5:
        colours, shapes = {i.colour for i in scene.shapes}, {i.name for i in scene.shapes}
        if mixed := [(c, s) for c, s in absent if c in colours and s in shapes]:
            return rng.choice(mixed)
    return rng.choice(absent) if absent else None


def absent_kind(rng: Random, scene: Scene) -> str:
    present = {i.name for i in scene.shapes}
    return rng.choice([s for s in SHAPES if s not in present])
