"""Scenes in words: a caption of one sentence, and a dense description from which questions can be answered."""

from __future__ import annotations

from collections import Counter
from random import Random

from vlmamba.data.scenes.question import at
from vlmamba.data.scenes.scene import Item, Scene
from vlmamba.data.scenes.vocabulary import article, plural

_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def noun_phrase(item: Item, size: bool = True) -> str:
    """An item with its attributes, no article: "large red striped star", "small dog", "blue word tea"."""
    if item.kind == "thing":
        return f"{item.size} {item.name}" if size and item.size else item.name
    if item.kind == "patch":
        return item.colour
    if item.written:
        return f"{item.colour} {item.kind} {item.name}"
    fill = "" if item.fill == "solid" else f" {item.fill}"
    return f"{item.size if size else ''} {item.colour}{fill} {item.name}".strip()


def item_phrase(item: Item, size: bool = False) -> str:
    phrase = noun_phrase(item, size)
    return f"the {phrase}" if item.written else article(phrase)


def listing(phrases: list[str]) -> str:
    """ "a", "a and b", "a, b and c" """
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def caption(scene: Scene, rng: Random) -> str:
    """One sentence on what the picture shows."""
    if scene.chart:
        chart = scene.chart
        names = listing(list(chart.labels))
        lead = rng.choice(("a bar chart of", "a chart with bars for", "bars for"))
        return f"{lead} {names}"
    if scene.table:
        table = scene.table
        content = plural({"patch": "colour"}.get(table.content, table.content))
        lead = rng.choice(("a table of", "a grid of", "a table with"))
        names = listing([i.name for i in scene.items if not table.keyed or i.column == 0][:6])
        return f"{lead} {content}: {names}"
    if scene.expression:
        return rng.choice(("a sum: {x}", "the picture says {x}", "a sign with {x}")).format(x=scene.items[0].name)
    counted: Counter[str] = Counter()
    phrases: dict[str, Item] = {}
    for item in scene.items:
        phrase = noun_phrase(item, size=False)
        counted[phrase] += 1
        phrases[phrase] = item
    parts = []
    for phrase, count in counted.items():
        item = phrases[phrase]
        if count == 1:
            parts.append(item_phrase(item))
        else:
            parts.append(f"{_COUNTS[count] if count < 10 else count} {plural(phrase)}")
    rng.shuffle(parts)
    lead = rng.choice(("", "", "a picture of ", "there is ", "we see "))
    return lead + listing(parts)


def description(scene: Scene, rng: Random, orders: bool = False) -> str:
    """Every object with its attributes and place, all text, tables and charts read out. `orders` adds who stands left
    of whom and above whom, which places alone do not tell."""
    if scene.chart:
        return _chart(scene)
    if scene.table:
        return _table(scene)
    ordered = sorted(scene.items, key=lambda i: (int(i.y / 42.7), i.x))
    parts = [f"{item_phrase(i, size=True)} {at(i.place)}" for i in ordered]
    lead = rng.choice(("there is ", "the picture shows ", "we see "))
    text = f"{lead}{listing(parts)}."
    if scene.kind == "text" and len(ordered) > 1:
        lines = sorted((i for i in scene.items if i.written), key=lambda i: i.y)
        text += f" from top to bottom it says {', '.join(i.name for i in lines)}."
    if orders and len(ordered) > 1:
        by_x = sorted(scene.items, key=lambda i: i.x)
        by_y = sorted(scene.items, key=lambda i: i.y)
        text += f" from left to right: {', '.join(noun_phrase(i, False) for i in by_x)}."
        text += f" from top to bottom: {', '.join(noun_phrase(i, False) for i in by_y)}."
    return text


def _table(scene: Scene) -> str:
    table = scene.table
    assert table is not None
    names = [i.colour if i.kind == "patch" else i.name for i in scene.items]
    rows = [names[r * table.columns : (r + 1) * table.columns] for r in range(table.rows)]
    if table.keyed:
        return "a table. " + " ".join(f"{key}: {value}." for key, value in rows)
    head = "columns a to " + "abcd"[table.columns - 1] if table.headed else f"{table.columns} columns"
    read = " ".join(f"row {r + 1}: {', '.join(row)}." for r, row in enumerate(rows))
    return f"a table of {table.rows} rows and {head}. {read}"


def _chart(scene: Scene) -> str:
    chart = scene.chart
    assert chart is not None
    bars = [f"{label}, {colour}: {value}." for label, colour, value in zip(chart.labels, chart.colours, chart.values)]
    return f"a bar chart of {len(bars)} {'lying' if chart.horizontal else 'upright'} bars. {' '.join(bars)}"


def open_reply(scene: Scene, item: Item, phrase: str) -> str:
    """A sentence on where an item is, by its place and a neighbour beyond doubt."""
    text = f"{phrase} is {at(item.place)}"
    for direction, other in scene.beside[id(item)].items():
        if other.written:
            continue
        way = {"left": "right of", "right": "left of", "above": "below", "below": "above"}[direction]
        return f"{text}, {way} the {noun_phrase(other, size=False)}"
    return text
