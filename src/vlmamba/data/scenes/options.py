"""Multiple choice, by letter, and open questions.

The wrong options are drawn as the right one was, so that none of them stands out without the picture.
"""

from __future__ import annotations

from collections.abc import Callable

from vlmamba.data.scenes.deck import contrasting
from vlmamba.data.scenes.describe import caption, item_phrase, listing, open_reply
from vlmamba.data.scenes.objects import absent_pairs
from vlmamba.data.scenes.question import Asker, Question, at
from vlmamba.data.scenes.scene import Item
from vlmamba.data.scenes.vocabulary import article, held_out_pair


def _lettered(
    asker: Asker,
    form: str,
    wordings: tuple[str, ...],
    right: str,
    draw: Callable[[], str],
    about: list[Item],
    **words: str,
) -> Question:
    """A question with two to four lettered options, the right one at a place drawn evenly."""
    count = asker.rng.choice((2, 3, 4, 4, 4))
    place = asker.rng.randrange(count)
    options: list[str] = []
    while len(options) < count - 1:
        if (wrong := draw()) != right and wrong not in options:
            options.append(wrong)
    options.insert(place, right)
    return asker.ask(f"choice.{form}-{count}", wordings, "ABCD"[place], about, options, "choice", **words)


def which_is_here(asker: Asker) -> Question | None:
    things = asker.scene.things
    if not things:
        return None
    item = asker.rng.choice(things)
    wordings = ("which of these is in the picture?", "which of these things can you see?")
    return _lettered(asker, "thing", wordings, item.name, asker.deck.absent_thing, things)


def which_shape_is_here(asker: Asker) -> Question | None:
    shapes = [i for i in asker.scene.shapes if not asker.scene.held_out or held_out_pair(i.colour, i.name)]
    absent = absent_pairs(asker.scene, asker.deck)
    if not shapes or len(absent) < 3:
        return None
    item = asker.rng.choice(shapes)
    draw = lambda: article(" ".join(asker.rng.choice(absent)))  # noqa: E731
    wordings = ("which of these is in the picture?", "which of these can you see?")
    return _lettered(asker, "shape", wordings, article(f"{item.colour} {item.name}"), draw, [item])


def thing_at(asker: Asker) -> Question | None:
    for item in asker.shuffled(asker.scene.things):
        if asker.alone(item):
            wordings = ("what thing is {x}?", "what is {x}?")
            about = asker.scene.things
            return _lettered(asker, "place", wordings, item.name, asker.deck.absent_thing, about, x=at(item.place))
    return None


def colour_of(asker: Asker) -> Question | None:
    found = asker.referable(asker.scene.shapes, 1, "colour")
    if not found:
        return None
    ((item, phrase),) = found
    held_out = asker.scene.held_out
    may_be = [c for c in contrasting(asker.scene.background.base) if held_out or not held_out_pair(c, item.name)]
    wordings = ("what colour is {x}?", "what is the colour of {x}?")
    return _lettered(asker, "colour", wordings, item.colour, lambda: asker.rng.choice(may_be), [item], x=phrase)


def count_of(asker: Asker) -> Question | None:
    if not asker.scene.groups:
        return None
    group = asker.rng.choice(asker.scene.groups)
    wordings = ("how many {x} are there?", "how many {x} can you see?")
    draw = lambda: str(asker.rng.randint(0, 6))  # noqa: E731
    return _lettered(asker, "count", wordings, str(group.count), draw, group.about, x=group.plural)


def word_here(asker: Asker) -> Question | None:
    if asker.scene.kind != "text" or not asker.scene.words:
        return None
    item = asker.rng.choice(asker.scene.words)
    wordings = ("which word is written?", "which of these words can you read?")
    return _lettered(asker, "word", wordings, item.name, asker.deck.word, [item])


def highest_bar(asker: Asker) -> Question | None:
    """All options are labels of the chart itself."""
    chart = asker.scene.chart
    if chart is None:
        return None
    way = asker.rng.choice(("highest", "lowest"))
    pick = max if way == "highest" else min
    options = asker.rng.sample(chart.labels, len(chart.labels))
    right = chart.labels[chart.values.index(pick(chart.values))]
    items = [Item("thing" if chart.labelled == "thing" else "word", label) for label in chart.labels]
    letter = "ABCDE"[options.index(right)]
    form = f"choice.bar-{len(options)}"
    return asker.ask(form, ("which has the {w} value?",), letter, items, options, "choice", w=way)


def _verified(
    asker: Asker, form: str, question: str, right: str, draw: Callable[[], str], about: list[Item], **words: str
) -> Question:
    """A question that names an answer and asks whether it is so."""
    true = asker.coin()
    while (name := draw()) == right:
        pass
    wordings = (question + " is it {v}?", question + " is it {v}? please answer yes or no.")
    v = right if true else name
    return asker.ask(form, wordings, "yes" if true else "no", about, kind="yesno", v=v, **words)


def is_colour(asker: Asker) -> Question | None:
    found = asker.referable(asker.scene.shapes, 1, "colour")
    if not found:
        return None
    ((item, phrase),) = found
    held_out = asker.scene.held_out
    may_be = [c for c in contrasting(asker.scene.background.base) if held_out or not held_out_pair(c, item.name)]
    question = "what colour is {x}?"
    return _verified(
        asker, "attributes.is-colour", question, item.colour, lambda: asker.rng.choice(may_be), [item], x=phrase
    )


def is_count(asker: Asker) -> Question | None:
    if not asker.scene.groups:
        return None
    group = asker.rng.choice(asker.scene.groups)
    draw = lambda: str(asker.rng.randint(0, 6))  # noqa: E731
    question = "how many {x} are there?"
    return _verified(asker, "counting.is", question, str(group.count), draw, group.about, x=group.plural)


def is_thing(asker: Asker) -> Question | None:
    for item in asker.shuffled(asker.scene.things):
        if asker.alone(item):
            name = article(item.name)
            draw = lambda: article(asker.deck.absent_thing())  # noqa: E731
            about = asker.scene.things
            return _verified(asker, "naming.is", "what is {x}?", name, draw, about, x=at(item.place))
    return None


def is_place(asker: Asker) -> Question | None:
    """The wrong place is that of something else, since places are not equally common."""
    found = [i for i in asker.scene.items if i.well_placed]
    for item, phrase in asker.referable(found, 1, "place"):
        others = [at(i.place) for i in found if i.place != item.place]
        if not others:
            return None
        draw = lambda: asker.rng.choice(others)  # noqa: B023, E731
        return _verified(asker, "relations.is-place", "where is {x}?", at(item.place), draw, [item], x=phrase)
    return None


def is_word(asker: Asker) -> Question | None:
    if len(asker.scene.words) != 1 or asker.scene.kind != "text":
        return None
    item = asker.scene.words[0]
    return _verified(asker, "reading.is", "what word is written?", item.name, asker.deck.word, [item])


def is_value(asker: Asker) -> Question | None:
    chart = asker.scene.chart
    if chart is None:
        return None
    index = asker.rng.randrange(len(chart.values))
    label = chart.labels[index]
    item = Item("thing" if chart.labelled == "thing" else "word", label)
    draw = lambda: str(asker.rng.randint(1, 10))  # noqa: E731
    return _verified(
        asker, "charts.is-value", "what is the value of {x}?", str(chart.values[index]), draw, [item], x=label
    )


def describe_it(asker: Asker) -> Question | None:
    wordings = ("describe the picture.", "what do you see?", "what is in this picture?", "what does the picture show?")
    about = asker.scene.items if asker.scene.held_out else ()
    return asker.ask("open.describe", wordings, caption(asker.scene, asker.rng), about, kind="open")


def list_things(asker: Asker) -> Question | None:
    scene = asker.scene
    if scene.kind not in ("rows", "free") or not scene.items:
        return None
    wordings = ("list everything in the picture.", "name all that you see.")
    ordered = sorted(scene.items, key=lambda i: (int(i.y / 42.7), i.x))
    answer = listing([item_phrase(i) for i in ordered])
    return asker.ask("open.list", wordings, answer, scene.items, kind="open")


def tell_where(asker: Asker) -> Question | None:
    for item, phrase in asker.referable([i for i in asker.scene.items if i.well_placed], 1, "place"):
        wordings = ("tell me where {x} is.", "describe where to find {x}.")
        return asker.ask("open.where", wordings, open_reply(asker.scene, item, phrase), [item], kind="open", x=phrase)
    return None
