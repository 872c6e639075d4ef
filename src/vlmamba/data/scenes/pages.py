"""Composing pictures to be read: signs with words and numbers, tables, bar charts."""

from __future__ import annotations

from random import Random

from vlmamba.data.scenes.deck import Deck, contrasting, draw_background, legible
from vlmamba.data.scenes.objects import any_object, new_text
from vlmamba.data.scenes.scene import SIDE, Chart, Item, Scene, Table
from vlmamba.data.scenes.sprites import FACES, available_things, text_size, thing_ratio
from vlmamba.data.scenes.vocabulary import written_size

_PANELS = ((250, 248, 240), (235, 240, 250), (252, 244, 214), (44, 46, 58), (30, 62, 66))
_LETTER_PX = (12, 40)
_HEAD = 14  # room for the letters above and the numbers beside a headed table
PLOT = (22.0, 8.0, 124.0, 108.0)  # left, top, right, bottom of an upright chart's plot
PLOT_LYING = (44.0, 6.0, 122.0, 112.0)
TOP = 10  # units of a chart's axis


def compose_text(rng: Random, held_out: bool) -> Scene:
    """One to four lines of words and numbers in sizes from 12 to 40 px, or a sum, sometimes on a panel or beside an
    object."""
    background = draw_background(rng)
    scene = Scene("text", background, held_out=held_out)
    base = background.base
    if rng.random() < 0.35:
        scene.panel_colour = base = rng.choice(_PANELS)
    deck = Deck(rng, held_out, base)
    content = rng.choice(("words", "words", "words", "numbers", "numbers", "mixed", "sum"))
    if held_out and content in ("numbers", "sum"):
        content = "words"
    extra = content == "mixed" or (content == "words" and rng.random() < 0.2)
    room = SIDE - (44 if extra else 6)
    _lines(deck, scene, content, room)
    if scene.panel_colour != (0, 0, 0):
        boxes = [i.box for i in scene.items]
        scene.panel = (
            max(1, min(b[0] for b in boxes) - 5),
            max(1, min(b[1] for b in boxes) - 5),
            min(SIDE - 1, max(b[2] for b in boxes) + 5),
            min(SIDE - 1, max(b[3] for b in boxes) + 5),
        )
    if extra:
        item = any_object(Deck(rng, held_out, background.base), ("small", "medium", "large"))
        item.x, item.y = round(rng.uniform(22, 106)), SIDE - 22
        scene.items.append(item)
    return scene


def _lines(deck: Deck, scene: Scene, content: str, room: int) -> None:
    """Fill `scene` with lines of text stacked in the upper `room` pixels, each in a colour of its own."""
    rng = deck.rng
    names = _line_names(deck, scene, content, room)
    colours = rng.sample(legible(deck.base), len(names))
    share = room / len(names)
    items = []
    for (kind, name), colour in zip(names, colours):
        px = rng.randint(_LETTER_PX[0], max(_LETTER_PX[0], min(_LETTER_PX[1], int(share * 1.1))))
        item = new_text(deck, kind, name, colour, px)
        while item.width > SIDE - 8 or item.height > share - 3:
            px -= 1
            width, height = text_size(item.text, item.face, px)
            item.px, item.width, item.height = px, width, height
        item.size = written_size(px)
        items.append(item)
    spare = room - sum(i.height for i in items)
    cuts = sorted(rng.uniform(0, max(0.0, spare - 4 * len(items))) for _ in items)
    top = 3.0
    for index, (item, cut) in enumerate(zip(items, cuts)):
        item.x = round(rng.uniform(item.width / 2 + 3, SIDE - item.width / 2 - 3))
        item.y = round(top + cut + 4 * index + item.height / 2)
        item.row = index
        top += item.height
    scene.items += items


def _line_names(deck: Deck, scene: Scene, content: str, room: int) -> list[tuple[str, str]]:
    rng = deck.rng
    if content == "sum":
        scene.expression = one, sign, two = _expression(rng)
        return [("sum", f"{one} {sign} {two}")]
    if content == "numbers":
        digits = rng.choice((9, 9, 20, 99, 99, 999))
        return [("number", str(deck.number(0, digits))) for _ in range(rng.choice((1, 2, 2, 2, 3, 4)))]
    if content == "mixed":
        return [
            ("word", deck.word()) if deck.held_out or rng.random() < 0.5 else ("number", str(deck.number()))
            for _ in range(rng.randint(1, 3))
        ]
    return [("word", deck.word()) for _ in range(rng.randint(1, 4 if room > 100 else 3))]


def _expression(rng: Random) -> tuple[int, str, int]:
    """A sum or difference of numbers below 10 or 20, the result drawn first and evenly."""
    if rng.random() < 0.5:
        result = rng.randint(0, 18)
        one = rng.randint(max(0, result - 9), min(9, result))
        return one, "+", result - one
    result = rng.randint(0, 9)
    return result + (two := rng.randint(0, 9)), "-", two


def compose_table(rng: Random, held_out: bool) -> Scene:
    """A grid of things, numbers, letters or patches of colour; or two columns, of which the first names the second."""
    background = draw_background(rng)
    deck = Deck(rng, held_out, background.base)
    scene = Scene("table", background, held_out=held_out)
    contents = ("number", "letter", "patch", "thing", "thing") if available_things() else ("number", "letter", "patch")
    if held_out or rng.random() < 0.5:
        rows, keys = rng.randint(3, 5), rng.choice(("word", "word", "thing") if available_things() else ("word",))
        values = rng.choice([c for c in (*contents, "word") if c not in (keys, "letter")])
        scene.table = Table(rows, 2, values, keyed=True)
        columns = [_cells(deck, keys, rows), _cells(deck, values, rows)]
        scene.items = [column[r] for r in range(rows) for column in columns]
    else:
        headed = rng.random() < 0.4
        rows, wide = rng.randint(2, 4), rng.randint(2, 4)
        content = rng.choice(contents)
        scene.table = Table(rows, wide, content, headed=headed)
        scene.items = _cells(deck, content, rows * wide)
    _fit_cells(deck, scene)
    return scene


def _cells(deck: Deck, content: str, count: int) -> list[Item]:
    """Cells of one content, all different where there are enough to choose from."""
    rng = deck.rng
    if content == "patch":
        colours = contrasting(deck.base)
        many = rng.sample(colours, min(count, len(colours)))
        many += [rng.choice(colours) for _ in range(count - len(many))]
        return [Item("patch", c, c, px=16, width=16, height=16) for c in many]
    if content == "thing":
        return [Item("thing", deck.thing(), px=22) for _ in range(count)]
    ink, face = deck.ink(), rng.randrange(FACES)
    if content == "number":
        high = rng.choice((9, 20, 99)) if count < 8 else 99
        names = [str(deck.number(0, high)) for _ in range(count)]
    elif content == "letter":
        names = [deck.letter() for _ in range(count)]
    else:
        names = [deck.word(3, 6) for _ in range(count)]
    kind = "number" if content == "number" else "word"
    return [new_text(deck, kind, name, ink, 15, face) for name in names]


def cell_edges(table: Table) -> tuple[float, float, float, float]:
    """left, top of the first cell; width, height of every cell."""
    start = 4.0 + (_HEAD if table.headed else 0)
    return start, start, (SIDE - 4 - start) / table.columns, (SIDE - 4 - start) / table.rows


def _fit_cells(deck: Deck, scene: Scene) -> None:
    """Put the items into their cells, as large as these allow."""
    table = scene.table
    assert table is not None
    left, top, wide, high = cell_edges(table)
    shrink = deck.rng.uniform(0.75, 1.0)
    for index, item in enumerate(scene.items):
        item.row, item.column = divmod(index, table.columns)
        item.x = round(left + wide * (item.column + 0.5))
        item.y = round(top + high * (item.row + 0.5))
        room = int((min(wide, high) - 5) * shrink)
        if item.kind == "thing":
            item.px = max(15, min(30, room))
            width, height = thing_ratio(item.name)
            item.width, item.height = width * item.px, height * item.px
        elif item.kind == "patch":
            item.px = max(12, min(30, room))
            item.width = item.height = item.px
        else:
            px = max(13, min(26, room))
            width, height = text_size(item.text, item.face, px)
            while width > wide - 5 and px > 12:
                px -= 1
                width, height = text_size(item.text, item.face, px)
            item.px, item.width, item.height = px, width, height


def compose_chart(rng: Random, held_out: bool) -> Scene:
    """Three to five bars of 1 to 10 units over words, letters or things, upright or lying; all values different."""
    background = draw_background(rng)
    deck = Deck(rng, held_out, background.base)
    kinds = ("word", "word", "letter", "thing") if available_things() else ("word", "word", "letter")
    labelled = rng.choice(("word", "thing") if held_out and available_things() else kinds)
    lying = rng.random() < 0.4
    count = rng.randint(3, 5)
    if labelled == "word" and not lying:
        count = min(count, 4)
    values = rng.sample(range(1, TOP + 1), count)
    hues = contrasting(background.base)
    colours = rng.sample(hues, count) if rng.random() < 0.6 else [rng.choice(hues)] * count
    room = 38.0 if lying else (PLOT[2] - PLOT[0]) / count - 2
    face = rng.choice((0, 1))
    labels = tuple(_labels(deck, labelled, count, room, face))
    chart = Chart(labelled, labels, tuple(colours), tuple(values), lying, face)
    return Scene("chart", background, chart=chart, held_out=held_out)


def _labels(deck: Deck, labelled: str, count: int, room: float, face: int) -> list[str]:
    if labelled == "thing":
        return [deck.thing() for _ in range(count)]
    if labelled == "letter":
        return [deck.letter() for _ in range(count)]
    labels: list[str] = []
    while len(labels) < count:
        word = deck.word(3, 5 if room > 30 else 3)
        if text_size(word, face, 12)[0] <= room:
            labels.append(word)
    return labels
