"""Questions on what is seen: names, attributes, existence, counts, comparisons, the odd one out.

Every form draws its answer evenly, or the two sides of it at random, before it looks for words.
"""

from __future__ import annotations

from vlmamba.data.scenes.deck import contrasting
from vlmamba.data.scenes.objects import absent_kind, absent_shape
from vlmamba.data.scenes.question import Asker, Question, at, turns_on_held_out_pair
from vlmamba.data.scenes.scene import Item
from vlmamba.data.scenes.vocabulary import SHAPES, SIZES, article, held_out_pair

_HAS = (
    "is there {x} in the picture?",
    "is there {x}?",
    "can you see {x}?",
    "does the picture show {x}?",
    "is there {x} in the image?",
)
_MANY = (
    "how many {x} are there?",
    "how many {x} can you see?",
    "count the {x}.",
    "how many {x} are in the picture?",
)


def naming_place(asker: Asker) -> Question | None:
    for item in asker.shuffled(asker.scene.things):
        if asker.alone(item):
            wordings = ("what thing is {x}?", "what is {x}?", "what do you see {x}?", "name the thing {x}.")
            return asker.ask("naming.place", wordings, item.name, [item], x=at(item.place))
    return None


def naming_only(asker: Asker) -> Question | None:
    names = {i.name for i in asker.scene.things}
    if len(names) != 1:
        return None
    item = asker.scene.things[0]
    wordings = ("what thing is in the picture?", "which thing can you see?", "what thing is this?")
    return asker.ask("naming.only", wordings, item.name, [item])


def naming_extreme(asker: Asker) -> Question | None:
    """The largest or smallest of the things, by a whole class of size."""
    things = sorted(asker.scene.things, key=lambda i: i.px)
    if len(things) < 2:
        return None
    word, item, second = asker.rng.choice((("largest", things[-1], things[-2]), ("smallest", things[0], things[1])))
    if item.size == second.size:
        return None
    wordings = ("what is the {x} thing?", "which thing is the {x}?", "name the {x} thing.")
    return asker.ask("naming.size", wordings, item.name, [item, second], x=word)


def colour(asker: Asker) -> Question | None:
    for item, phrase in asker.referable(asker.scene.shapes, 1, "colour"):
        wordings = ("what colour is {x}?", "what is the colour of {x}?", "which colour does {x} have?")
        return asker.ask("attributes.colour", wordings, item.colour, [item], x=phrase)
    return None


def shape(asker: Asker) -> Question | None:
    for item, phrase in asker.referable(asker.scene.shapes, 1, "shape"):
        wordings = ("what kind of shape is {x}?", "what is {x}?", "which shape is {x}?")
        return asker.ask("attributes.shape", wordings, item.name, [item], x=phrase)
    return None


def size(asker: Asker) -> Question | None:
    """Asked only where all three sizes were equally likely."""
    if asker.scene.kind not in ("rows", "free") or asker.scene.grid not in (None, (3, 3)):
        return None
    for item, phrase in asker.referable(asker.scene.objects, 1, "size"):
        wordings = ("what size is {x}?", "is {x} small, medium or large?", "how large is {x}?")
        return asker.ask("attributes.size", wordings, item.size, [item], SIZES, x=phrase)
    return None


def pattern(asker: Asker) -> Question | None:
    if asker.scene.kind == "odd" or any(g.kind == "pattern" for g in asker.scene.groups):
        return None
    for item, phrase in asker.referable([i for i in asker.scene.shapes if i.size != "small"], 1):
        wordings = ("what pattern does {x} have?", "is {x} solid, outlined, striped or dotted?", "how is {x} filled?")
        return asker.ask("attributes.pattern", wordings, item.fill, [item], x=phrase)
    return None


def text_colour(asker: Asker) -> Question | None:
    written = [i for i in asker.scene.items if i.written]
    for item in asker.shuffled(written)[:1]:
        wordings = ("what colour is the {k} {x}?", "in which colour is the {k} {x} written?")
        return asker.ask("attributes.ink", wordings, item.colour, [item], k=item.kind, x=item.name)
    return None


def exists_thing(asker: Asker) -> Question | None:
    if not asker.scene.things:
        return None
    here, absent = asker.scene.things, Item("thing", asker.deck.absent_thing())
    if asker.scene.held_out:  # both answers must turn on a pair with something that is there
        here = [i for i in here if turns_on_held_out_pair(i, here)]
        if not here or not turns_on_held_out_pair(absent, asker.scene.things):
            return None
    present = asker.coin()
    item = asker.rng.choice(here) if present else absent
    answer = "yes" if present else "no"
    return asker.ask("existence.thing", _HAS, answer, [item, *asker.scene.things], kind="yesno", x=article(item.name))


def exists_shape(asker: Asker) -> Question | None:
    shapes = [i for i in asker.scene.shapes if not asker.scene.held_out or held_out_pair(i.colour, i.name)]
    if not shapes:
        return None
    absent = absent_shape(asker.rng, asker.scene, asker.deck)
    if absent is None:
        return None
    present = asker.coin()
    item = asker.rng.choice(shapes) if present else Item("shape", absent[1], absent[0])
    answer = "yes" if present else "no"
    phrase = article(f"{item.colour} {item.name}")
    return asker.ask("existence.shape", _HAS, answer, [item], kind="yesno", x=phrase)


def exists_kind(asker: Asker) -> Question | None:
    """A shape of any colour, or a colour of any shape."""
    shapes = asker.scene.shapes
    present = asker.coin()
    if asker.coin():
        if not 0 < len({i.name for i in shapes}) < len(SHAPES):
            return None
        name = asker.rng.choice(shapes).name if present else absent_kind(asker.rng, asker.scene)
        form, phrase = "existence.kind", article(name)
    else:
        here = {i.colour for i in shapes}
        absent = [c for c in contrasting(asker.scene.background.base) if c not in here]
        if not here or not absent:
            return None
        name = asker.rng.choice(shapes).colour if present else asker.rng.choice(absent)
        form, phrase = "existence.colour", article(f"{name} shape")
    return asker.ask(form, _HAS, "yes" if present else "no", kind="yesno", x=phrase)


def count(asker: Asker) -> Question | None:
    if not asker.scene.groups:
        return None
    group = asker.rng.choice(asker.scene.groups)
    return asker.ask(f"counting.{group.kind}", _MANY, str(group.count), group.about, x=group.plural)


def as_many(asker: Asker) -> Question | None:
    """Whether two groups are equally large."""
    if not asker.scene.groups:
        return None
    one, two = asker.rng.sample(asker.scene.groups, 2)
    wordings = ("are there as many {x} as {y}?", "are there equally many {x} and {y}?")
    truth = "yes" if one.count == two.count else "no"
    about = [*one.about, *two.about]
    return asker.ask("comparison.equal", wordings, truth, about, kind="yesno", x=one.plural, y=two.plural)


def more(asker: Asker) -> Question | None:
    """Two groups of different size: which is larger, or whether the one named first is."""
    if not asker.scene.groups or asker.scene.groups[0].count == asker.scene.groups[1].count:
        return None
    one, two = asker.rng.sample(asker.scene.groups, 2)
    about = [*one.about, *two.about]
    word = asker.rng.choice(("more", "fewer"))
    first = (one.count > two.count) == (word == "more")
    if asker.coin():
        wordings = ("are there {w} {x} or {w} {y}?", "which are there {w} of, {x} or {y}?")
        names = (one.plural, two.plural)
        answer = names[not first]
        return asker.ask("comparison.number", wordings, answer, about, names, w=word, x=one.plural, y=two.plural)
    wordings = ("are there {w} {x} than {y}?", "can you see {w} {x} than {y}?")
    truth = "yes" if first else "no"
    return asker.ask("comparison.more", wordings, truth, about, kind="yesno", w=word, x=one.plural, y=two.plural)


def larger(asker: Asker) -> Question | None:
    """Two objects of different classes of size."""
    found = asker.referable(asker.scene.objects, 5)
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :] if a[0].size != b[0].size]
    if not pairs:
        return None
    (one, x), (two, y) = asker.rng.sample(asker.rng.choice(pairs), 2)
    word = asker.rng.choice(("larger", "smaller"))
    first = (one.px > two.px) == (word == "larger")
    if asker.coin():
        wordings = ("which is {w}, {x} or {y}?", "what is {w}: {x} or {y}?")
        answer = (x if first else y).removeprefix("the ")
        names = (x.removeprefix("the "), y.removeprefix("the "))
        return asker.ask("comparison.size", wordings, answer, [one, two], names, w=word, x=x, y=y)
    wordings = ("is {x} {w} than {y}?", "does {x} look {w} than {y}?")
    truth = "yes" if first else "no"
    return asker.ask("comparison.larger", wordings, truth, [one, two], kind="yesno", w=word, x=x, y=y)


def odd(asker: Asker) -> Question | None:
    """What sets the odd one apart, or where it stands."""
    item, odd_in = asker.scene.odd, asker.scene.odd_in
    if item is None:
        return None
    usual = asker.scene.items[-1] if asker.scene.items[-1] is not item else asker.scene.items[0]
    if asker.rng.random() < 0.4:
        wordings = ("where is the odd one out?", "where is the one that is not like the others?")
        return asker.ask("odd-one-out.place", wordings, item.place, [item, usual])
    if odd_in == "size":
        wordings = ("is the odd one out small or large?", "one is not like the others. is it small or large?")
        return asker.ask("odd-one-out.size", wordings, item.size, [item], ("small", "large"))
    wordings = ("what {k} is the odd one out?", "one is not like the others. what {k} is it?")
    if odd_in == "pattern":
        wordings = ("what pattern does the odd one out have?", "one is not like the others. what pattern does it have?")
    answer = {"thing": item.name, "shape": item.name, "colour": item.colour, "pattern": item.fill}[odd_in]
    return asker.ask(f"odd-one-out.{odd_in}", wordings, answer, [item, usual], k=odd_in)


def usual(asker: Asker) -> Question | None:
    """What all but the odd one have in common."""
    item, odd_in = asker.scene.odd, asker.scene.odd_in
    if item is None or odd_in not in ("thing", "shape", "colour"):
        return None
    other = next(i for i in asker.scene.items if i is not item)
    wordings = ("all but one are of the same {k}. which {k}?", "what {k} are all the others but one?")
    if odd_in == "thing":
        wordings = ("all but one are the same thing. what thing?", "what thing are all the others but one?")
    answer = other.colour if odd_in == "colour" else other.name
    return asker.ask(f"odd-one-out.usual-{odd_in}", wordings, answer, [item, other], k=odd_in)
