"""Questions on what is written: words, numbers and sums, tables, charts."""

from __future__ import annotations

from vlmamba.data.scenes.question import Asker, Question
from vlmamba.data.scenes.scene import Item
from vlmamba.data.scenes.vocabulary import article


def _which(asker: Asker, lines: list[Item], item: Item) -> str:
    """A phrase for one of several words or of several numbers: by colour, height or size; "" where none fits."""
    noun = item.kind
    if len(lines) == 1:
        return f"the {noun}"
    options = []
    if asker.scene.counts["ink", noun, item.colour] == 1:
        options.append(f"the {item.colour} {noun}")
    ranked = sorted(lines, key=lambda i: i.y)
    if ranked[0] is item and ranked[1].y - item.y >= MIN_RISE:
        options += [f"the {noun} at the top", f"the first {noun}"]
    if ranked[-1] is item and item.y - ranked[-2].y >= MIN_RISE:
        options += [f"the {noun} at the bottom", f"the last {noun}"]
    by_size = sorted(lines, key=lambda i: i.px)
    if by_size[-1] is item and item.px >= 1.35 * by_size[-2].px:
        options.append(f"the {noun} in the largest print")  # "the largest number" would be its value
    return asker.rng.choice(options) if options else ""


MIN_RISE = 10  # how much higher a line's middle stands than the next one's where its place names it


def word(asker: Asker) -> Question | None:
    """Read a word out."""
    for item in asker.shuffled(asker.scene.words):
        if phrase := _which(asker, asker.scene.words, item):
            wordings: tuple[str, ...] = ("what is {x}?", "read {x}.", "what does {x} say?")
            if phrase == "the word":
                wordings = ("what word is written?", "what does the text say?", "read the word.", "what is written?")
            return asker.ask("reading.word", wordings, item.name, [item], x=phrase)
    return None


def letter(asker: Asker) -> Question | None:
    """The first or last letter of a word."""
    for item in asker.shuffled(asker.scene.words):
        if phrase := _which(asker, asker.scene.words, item):
            which, answer = asker.rng.choice((("first", item.name[0]), ("last", item.name[-1])))
            wordings = ("what is the {w} letter of {x}?", "with which letter does {x} {v}?")
            verb = "begin" if which == "first" else "end"
            return asker.ask(f"reading.{which}-letter", wordings, answer, [item], x=phrase, w=which, v=verb)
    return None


def number(asker: Asker) -> Question | None:
    """Read a number out."""
    if asker.scene.expression:
        return None
    for item in asker.shuffled(asker.scene.numbers):
        if phrase := _which(asker, asker.scene.numbers, item):
            wordings: tuple[str, ...] = ("what is {x}?", "read {x}.")
            if phrase == "the number":
                wordings = ("what number is written?", "which number can you see?", "read the number.")
            return asker.ask("numbers.read", wordings, item.name, [item], x=phrase)
    return None


def exists_word(asker: Asker) -> Question | None:
    """Whether a word is written: the absent one is drawn as the present ones were."""
    if asker.scene.kind != "text" or not asker.scene.words:
        return None
    present = asker.coin()
    item = asker.rng.choice(asker.scene.words) if present else Item("word", asker.deck.word())
    wordings = ("is the word {x} written?", "does the picture say {x}?", "can you read the word {x}?")
    return asker.ask("existence.word", wordings, "yes" if present else "no", [item], kind="yesno", x=item.name)


def total(asker: Asker) -> Question | None:
    """Sum or difference of two numbers that are written."""
    lines = asker.scene.numbers
    if asker.scene.expression or len(lines) < 2 or any(int(i.name) > 20 for i in lines):
        return None
    one, two = asker.rng.sample(lines, 2)
    a, b = int(one.name), int(two.name)
    if len(lines) == 2 and asker.coin():
        if asker.coin():
            wordings = ("what is the sum of the two numbers?", "what do the two numbers add up to?")
            return asker.ask("arithmetic.sum", wordings, str(a + b))
        wordings = ("what is the difference of the two numbers?", "by how much do the two numbers differ?")
        return asker.ask("arithmetic.difference", wordings, str(abs(a - b)))
    wordings = ("what is {x} plus {y}?", "add {x} and {y}.")
    x, y = f"the {one.colour} number", f"the {two.colour} number"
    return asker.ask("arithmetic.plus", wordings, str(a + b), x=x, y=y)


def larger_number(asker: Asker) -> Question | None:
    lines = asker.scene.numbers
    if asker.scene.expression or len(lines) < 2:
        return None
    word = asker.rng.choice(("largest", "smallest"))
    if asker.coin():
        pick, most = (max, "highest") if word == "largest" else (min, "lowest")
        wordings: tuple[str, ...] = ("what is the value of the {w} number?", "which number has the {w} value?")
        return asker.ask(f"arithmetic.{most}", wordings, str(pick(int(i.name) for i in lines)), w=most)
    one, two = asker.rng.sample(lines, 2)
    greater = "greater" if word == "largest" else "less"
    first = (int(one.name) > int(two.name)) == (greater == "greater")
    wordings = ("which number is {w}, the {x} or the {y} one?", "is the {x} or the {y} number {w}?")
    names = (one.colour, two.colour)
    return asker.ask("arithmetic.compare", wordings, names[not first], choices=names, w=greater, x=names[0], y=names[1])


def parity(asker: Asker) -> Question | None:
    if asker.scene.expression or len(asker.scene.numbers) != 1:
        return None
    item = asker.scene.numbers[0]
    names = asker.rng.sample(("even", "odd"), 2)
    answer = "odd" if int(item.name) % 2 else "even"
    wordings = ("is the number {x} or {y}?",)
    return asker.ask("arithmetic.parity", wordings, answer, choices=names, x=names[0], y=names[1])


def expression(asker: Asker) -> Question | None:
    if asker.scene.expression is None:
        return None
    one, sign, two = asker.scene.expression
    wordings = ("what is the result?", "work out what is written.", "what does this come to?")
    return asker.ask("arithmetic.written", wordings, str(one + two if sign == "+" else one - two))


def operand(asker: Asker) -> Question | None:
    """The first or second number of a written sum, or its sign."""
    if asker.scene.expression is None:
        return None
    one, _, two = asker.scene.expression
    which, value = asker.rng.choice((("first", one), ("second", two)))
    return asker.ask("numbers.operand", ("what is the {w} number?", "read the {w} number."), str(value), w=which)


def _cell(item: Item) -> str:
    """A cell's content as one refers to it."""
    if item.kind == "patch":
        return f"the {item.colour} cell"
    return f"the {item.name}" if item.kind == "thing" else item.name


def _content(item: Item) -> str:
    return item.colour if item.kind == "patch" else item.name


def keyed(asker: Asker) -> Question | None:
    """Look a row up by its first column, or by its second: the retrieval probe."""
    table = asker.scene.table
    if table is None or not table.keyed:
        return None
    row = asker.rng.randrange(table.rows)
    key, value = asker.scene.items[2 * row], asker.scene.items[2 * row + 1]
    if asker.coin():
        key, value = value, key
    wordings = ("what is next to {x}?", "what stands in the row of {x}?", "what goes with {x}?")
    return asker.ask(f"lookup.{value.kind}", wordings, _content(value), [key, value], x=_cell(key))


def cell(asker: Asker) -> Question | None:
    """What is in a cell, by row and column or by its heading."""
    table = asker.scene.table
    if table is None:
        return None
    item = asker.rng.choice(asker.scene.items)
    if table.headed:
        where = f"{'ABCD'[item.column]}{item.row + 1}"
        wordings = ("what is in cell {x}?", "what does cell {x} hold?")
    else:
        where = f"row {item.row + 1}, column {item.column + 1}"
        wordings = ("what is in {x}?", "what stands in {x}?")
    return asker.ask(f"lookup.cell-{item.kind}", wordings, _content(item), [item], x=where)


def cell_beside(asker: Asker) -> Question | None:
    """What is next to something inside a table."""
    table = asker.scene.table
    if table is None or table.keyed:
        return None
    names = [_content(i) for i in asker.scene.items]
    steps = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
    options = [
        (item, way, asker.scene.items[(item.row + r) * table.columns + item.column + c])
        for item in asker.scene.items
        for way, (r, c) in steps.items()
        if 0 <= item.row + r < table.rows and 0 <= item.column + c < table.columns and names.count(_content(item)) == 1
    ]
    if not options:
        return None
    item, way, other = asker.rng.choice(options)
    wordings = ("what is directly {d} {x}?", "what stands directly {d} {x}?")
    return asker.ask(f"lookup.beside-{other.kind}", wordings, _content(other), [item, other], d=way, x=_cell(item))


def cell_place(asker: Asker) -> Question | None:
    """The row or column that holds something."""
    table = asker.scene.table
    if table is None:
        return None
    item = asker.rng.choice(asker.scene.items)
    if sum(_content(i) == _content(item) for i in asker.scene.items) > 1:
        return None
    if table.headed and asker.coin():
        answer = f"{'abcd'[item.column]}{item.row + 1}"
        return asker.ask("lookup.name-cell", ("in which cell is {x}?", "which cell holds {x}?"), answer, x=_cell(item))
    by_row = table.keyed or table.headed or asker.coin()
    way, at = ("row", item.row) if by_row else ("column", item.column)
    wordings = ("in which {w} is {x}?", "which {w} holds {x}?")
    return asker.ask(f"lookup.{way}", wordings, str(at + 1), w=way, x=_cell(item))


def cell_exists(asker: Asker) -> Question | None:
    table = asker.scene.table
    if table is None or table.keyed or table.content != "thing":
        return None
    present = asker.coin()
    item = asker.rng.choice(asker.scene.items) if present else Item("thing", asker.deck.absent_thing())
    wordings = ("is {x} in the table?", "does the table hold {x}?")
    answer = "yes" if present else "no"
    return asker.ask("lookup.exists", wordings, answer, [item, *asker.scene.items], kind="yesno", x=article(item.name))


def table_size(asker: Asker) -> Question | None:
    table = asker.scene.table
    if table is None or table.keyed:
        return None
    way, answer = asker.rng.choice((("rows", table.rows), ("columns", table.columns)))
    wordings = ("how many {w} does the table have?", "how many {w} are there in the table?")
    return asker.ask(f"lookup.{way}", wordings, str(answer), w=way)


def _bar(asker: Asker, index: int) -> tuple[str, Item]:
    """How one refers to a bar, and the item that names it."""
    chart = asker.scene.chart
    assert chart is not None
    label = chart.labels[index]
    item = Item("thing" if chart.labelled == "thing" else "word", label)
    if len(set(chart.colours)) == len(chart.colours) and asker.rng.random() < 0.3:
        return f"the {chart.colours[index]} bar", item
    return (f"the {label}" if chart.labelled == "thing" else label), item


def bar_value(asker: Asker) -> Question | None:
    chart = asker.scene.chart
    if chart is None:
        return None
    index = asker.rng.randrange(len(chart.values))
    phrase, item = _bar(asker, index)
    wordings = ("what is the value of {x}?", "how high is the value of {x}?", "what value does {x} have?")
    return asker.ask("charts.value", wordings, str(chart.values[index]), [item], x=phrase)


def bar_end(asker: Asker) -> Question | None:
    """Which bar is longest or shortest, or has a given value."""
    chart = asker.scene.chart
    if chart is None:
        return None
    way = asker.rng.choice(("highest", "lowest", "value"))
    pick = max if way == "highest" else min
    index = asker.rng.randrange(len(chart.values)) if way == "value" else chart.values.index(pick(chart.values))
    wordings = ("what has the {w} value?", "which bar has the {w} value?", "which label has the {w} value?")
    if way == "value":
        wordings = ("what has the value {v}?", "which bar has the value {v}?", "which label has the value {v}?")
    item = Item("thing" if chart.labelled == "thing" else "word", chart.labels[index])
    form = f"charts.{way}-{chart.labelled}"
    return asker.ask(form, wordings, chart.labels[index], [item], w=way, v=str(chart.values[index]))


def bar_compare(asker: Asker) -> Question | None:
    """Which of two bars is longer, whether the first is, or by how much they differ."""
    chart = asker.scene.chart
    if chart is None:
        return None
    one, two = asker.rng.sample(range(len(chart.values)), 2)
    (x, a), (y, b) = _bar(asker, one), _bar(asker, two)
    word = asker.rng.choice(("higher", "lower"))
    gap = chart.values[one] - chart.values[two]
    first = (gap > 0) == (word == "higher")
    way = asker.rng.randrange(3)
    if way == 0:
        wordings = ("which is {w}, {x} or {y}?", "which value is {w}, {x} or {y}?")
        names = (x.removeprefix("the "), y.removeprefix("the "))
        return asker.ask("charts.which", wordings, names[not first], [a, b], names, w=word, x=x, y=y)
    if way == 1:
        wordings = ("is {x} {w} than {y}?", "is the value of {x} {w} than that of {y}?")
        return asker.ask("charts.compare", wordings, "yes" if first else "no", [a, b], kind="yesno", w=word, x=x, y=y)
    wordings = ("by how much do {x} and {y} differ?", "what is the difference of {x} and {y}?")
    return asker.ask("charts.difference", wordings, str(abs(gap)), [a, b], x=x, y=y)


def bar_count(asker: Asker) -> Question | None:
    chart = asker.scene.chart
    if chart is None:
        return None
    wordings = ("how many bars are there?", "how many bars does the chart have?")
    return asker.ask("charts.count", wordings, str(len(chart.values)))


def bar_colour(asker: Asker) -> Question | None:
    chart = asker.scene.chart
    if chart is None:
        return None
    index = asker.rng.randrange(len(chart.values))
    item = Item("thing" if chart.labelled == "thing" else "word", chart.labels[index])
    label = f"the {item.name}" if item.kind == "thing" else item.name
    wordings = ("what colour is the bar of {x}?", "which colour does the bar of {x} have?")
    return asker.ask("charts.colour", wordings, chart.colours[index], [item], x=label)
