"""Questions on where things stand: sides, neighbours, ends, between, nearest; and two such steps in a row."""

from __future__ import annotations

from math import hypot

from vlmamba.data.scenes.question import Asker, Question
from vlmamba.data.scenes.scene import DIRECTIONS, MARGIN, Item, offset

_OF = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
_ENDS = {
    "left": ("furthest to the left", "leftmost"),
    "right": ("furthest to the right", "rightmost"),
    "above": ("highest", "topmost"),
    "below": ("lowest", "bottommost"),
}


def side(asker: Asker) -> Question | None:
    """Which of two opposite sides an object is on, as a choice or as yes or no."""
    found = asker.referable(asker.scene.items, 4, "place")  # what stands "on the right" is seldom left of something
    axes = (("left", "right"), ("above", "below"))
    options = [
        (a, b, axis)
        for i, a in enumerate(found)
        for b in found[i + 1 :]
        for axis in axes
        if abs(offset(a[0], b[0], axis[0])) >= MARGIN + 2
    ]
    if not options:
        return None
    a, b, axis = asker.rng.choice(options)
    (one, x), (two, y) = asker.rng.sample((a, b), 2)
    first, second = asker.rng.sample(axis, 2)
    true = offset(one, two, first) > 0
    if asker.coin():
        wordings: tuple[str, ...] = ("is {x} {d} {y}?", "does {x} stand {d} {y}?", "in the picture, is {x} {d} {y}?")
        answer = "yes" if true else "no"
        return asker.ask("relations.side", wordings, answer, [one, two], kind="yesno", x=x, y=y, d=_OF[first])
    wordings = ("is {x} {d} or {e} {y}?", "where does {x} stand: {d} or {e} {y}?")
    answer = first if true else second
    d = first if first in ("left", "right") else _OF[first]
    return asker.ask("relations.which", wordings, answer, [one, two], (first, second), x=x, y=y, d=d, e=_OF[second])


def _step(asker: Asker, direction: str) -> str:
    """Words for being next to something in slots, or alone on that side of it."""
    return f"directly {_OF[direction]}" if asker.scene.grid else _OF[direction]


def _noun(item: Item) -> str:
    return item.kind if item.kind in ("thing", "shape") else "text"


def beside(asker: Asker) -> Question | None:
    """What stands next to something: its name, or a shape's colour."""
    for item, phrase in asker.referable(asker.scene.items, 4):
        near = asker.scene.beside[id(item)]
        if not near:
            continue
        direction = asker.rng.choice(list(near))
        other = near[direction]
        if other.kind == "shape" and asker.coin():
            wordings: tuple[str, ...] = (
                "what colour is the shape {d} {x}?",
                "which colour does the shape {d} {x} have?",
            )
            return asker.ask(
                "relations.colour", wordings, other.colour, [item, other], x=phrase, d=_step(asker, direction)
            )
        wordings = ("what is {d} {x}?", "what stands {d} {x}?", "what is the {n} {d} {x}?")
        return asker.ask(
            f"relations.{_noun(other)}", wordings, other.name, [item, other], x=phrase, d=_step(asker, direction),
            n=_noun(other),
        )  # fmt: skip
    return None


def end(asker: Asker) -> Question | None:
    """The object furthest to one side, by 8 px or more."""
    items = asker.scene.items
    if len(items) < 2:
        return None
    for direction in asker.rng.sample(DIRECTIONS, 4):
        ranked = sorted(items, key=lambda i: offset(i, items[0], direction))
        if offset(ranked[-1], ranked[-2], direction) >= 8:
            item = ranked[-1]
            wordings = ("what is {d}?", "which object is {d}?")
            words = asker.rng.choice(_ENDS[direction])
            words = words if words.startswith("furthest") else f"the {words}"
            return asker.ask("relations.end", wordings, item.name, [item, ranked[-2]], d=words)
    return None


def between(asker: Asker) -> Question | None:
    """The middle one of three neighbours in a row or column."""
    if not asker.scene.grid:
        return None
    for item in asker.shuffled(asker.scene.items):
        near = asker.scene.beside[id(item)]
        for a, b in asker.rng.sample((("left", "right"), ("above", "below")), 2):
            if a in near and b in near:
                ends = [(near[a], asker.reference(near[a])), (near[b], asker.reference(near[b]))]
                (_, x), (_, y) = asker.rng.sample(ends, 2)
                if x and y:
                    wordings = ("what is between {x} and {y}?", "what stands between {x} and {y}?")
                    return asker.ask("relations.between", wordings, item.name, [item, near[a], near[b]], x=x, y=y)
    return None


def nearest(asker: Asker) -> Question | None:
    """The object whose centre is nearest, all others being 1.4 times as far."""
    for item, phrase in asker.referable(asker.scene.items, 4):
        others = sorted(
            (hypot(o.x - item.x, o.y - item.y), index, o) for index, o in enumerate(asker.scene.items) if o is not item
        )
        if len(others) >= 2 and others[1][0] >= 1.4 * others[0][0]:
            wordings = ("what is nearest to {x}?", "what is closest to {x}?")
            return asker.ask("relations.nearest", wordings, others[0][2].name, [item, others[0][2]], x=phrase)
    return None


def place(asker: Asker) -> Question | None:
    for item, phrase in asker.referable([i for i in asker.scene.items if i.well_placed], 1, "place"):
        wordings = ("where is {x}?", "in which part of the picture is {x}?", "where do you see {x}?")
        return asker.ask("relations.place", wordings, item.place, [item], x=phrase)
    return None


def _finish(asker: Asker, form: str, path: list[Item], goal: Item, words: str) -> Question:
    """Ask for the name of what a path leads to, or for a shape's colour."""
    if goal.kind == "shape" and asker.coin():
        wordings: tuple[str, ...] = ("what colour is the shape {w}?", "which colour does the shape {w} have?")
        return asker.ask(f"two-step.{form}-colour", wordings, goal.colour, [*path, goal], w=words)
    wordings = ("what is {w}?", "what stands {w}?", "what is the {n} {w}?")
    return asker.ask(f"two-step.{form}-{_noun(goal)}", wordings, goal.name, [*path, goal], w=words, n=_noun(goal))


def two_steps(asker: Asker) -> Question | None:
    """What is left of the thing above the star: two neighbours in a row, not back to the start."""
    for item, phrase in asker.referable(asker.scene.items, 5):
        ways = [
            (first, middle, second, goal)
            for first, middle in asker.scene.beside[id(item)].items()
            for second, goal in asker.scene.beside[id(middle)].items()
            if goal is not item
        ]
        if ways:
            first, middle, second, goal = asker.rng.choice(ways)
            words = f"{_step(asker, second)} the {_noun(middle)} {_step(asker, first)} {phrase}"
            return _finish(asker, "walk", [item, middle], goal, words)
    return None


def extreme_step(asker: Asker) -> Question | None:
    """What is next to the largest or smallest object, or to the one at an end."""
    items = asker.scene.objects
    if len(items) < 3:
        return None
    ranked = sorted(items, key=lambda i: i.px)
    options = []
    if ranked[-1].size != ranked[-2].size:
        options.append((ranked[-1], "the largest object"))
    if ranked[0].size != ranked[1].size:
        options.append((ranked[0], "the smallest object"))
    for item, phrase in asker.rng.sample(options, len(options)):
        near = asker.scene.beside[id(item)]
        if near:
            direction = asker.rng.choice(list(near))
            return _finish(asker, "extreme", [item], near[direction], f"{_step(asker, direction)} {phrase}")
    return None
