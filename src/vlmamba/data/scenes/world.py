"""The world: samples of pictures with captions, descriptions and questions, each a pure function of its number."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping
from functools import cached_property
from itertools import accumulate
from random import Random

from PIL import Image

from vlmamba.data.scenes import objects, options, pages, read, related, seen
from vlmamba.data.scenes.chance import Chance
from vlmamba.data.scenes.deck import Deck
from vlmamba.data.scenes.describe import caption, description
from vlmamba.data.scenes.marks import Mark
from vlmamba.data.scenes.question import Asker, Question
from vlmamba.data.scenes.render import render
from vlmamba.data.scenes.scene import SIDE, Scene

Form = Callable[[Asker], Question | None]

SPLITS = ("train", "validation", "test", "held-out")
# How often each kind of picture comes.
KINDS: dict[str, float] = {
    "rows": 0.24,
    "free": 0.14,
    "crowd": 0.18,
    "odd": 0.06,
    "text": 0.2,
    "table": 0.1,
    "chart": 0.08,
}
_COMPOSERS: dict[str, Callable[[Random, bool], Scene]] = {
    "rows": objects.compose_rows,
    "free": objects.compose_free,
    "crowd": objects.compose_crowd,
    "odd": objects.compose_odd,
    "text": pages.compose_text,
    "table": pages.compose_table,
    "chart": pages.compose_chart,
}
_OBJECTS: tuple[tuple[Form, float], ...] = (
    (seen.naming_place, 3),
    (seen.naming_only, 1),
    (seen.naming_extreme, 1),
    (seen.colour, 1.5),
    (seen.shape, 1),
    (seen.size, 1),
    (seen.pattern, 1),
    (seen.exists_thing, 1.2),
    (seen.exists_shape, 1.2),
    (seen.exists_kind, 0.6),
    (seen.larger, 1.6),
    (related.side, 2.5),
    (related.beside, 2.5),
    (related.end, 0.8),
    (related.between, 1),
    (related.nearest, 0.6),
    (related.place, 1),
    (related.two_steps, 3),
    (related.extreme_step, 1),
    (read.word, 1.5),
    (read.number, 1.5),
    (options.which_is_here, 0.4),
    (options.which_shape_is_here, 0.3),
    (options.thing_at, 0.5),
    (options.colour_of, 0.3),
    (options.is_colour, 0.3),
    (options.is_thing, 0.3),
    (options.is_place, 0.3),
    (options.describe_it, 0.25),
    (options.list_things, 0.15),
    (options.tell_where, 0.25),
)
_FORMS: dict[str, tuple[tuple[Form, float], ...]] = {
    "rows": _OBJECTS,
    "free": _OBJECTS,
    "crowd": (
        *((form, weight / 4) for form, weight in _OBJECTS),
        (seen.count, 9),
        (seen.more, 5),
        (options.count_of, 1),
        (options.is_count, 1),
    ),
    "odd": ((seen.odd, 6), (seen.usual, 2), (seen.exists_kind, 1), (seen.exists_thing, 1), (options.describe_it, 0.5)),
    "text": (
        (read.word, 8),
        (read.letter, 3),
        (read.number, 5),
        (read.exists_word, 1.5),
        (read.total, 6),
        (read.larger_number, 3),
        (read.parity, 1),
        (read.expression, 5),
        (read.operand, 2),
        (seen.text_colour, 1.5),
        (seen.exists_thing, 0.5),
        (seen.naming_only, 0.5),
        (options.word_here, 1),
        (options.is_word, 0.5),
        (options.describe_it, 0.5),
    ),
    "table": (
        (read.keyed, 8),
        (read.cell, 4),
        (read.cell_beside, 4),
        (read.cell_place, 2),
        (read.cell_exists, 1.5),
        (read.table_size, 1),
        (options.which_is_here, 0.5),
        (options.describe_it, 0.3),
    ),
    "chart": (
        (read.bar_value, 5),
        (read.bar_end, 4),
        (read.bar_compare, 5),
        (read.bar_count, 0.7),
        (read.bar_colour, 1.5),
        (options.highest_bar, 1),
        (options.is_value, 0.7),
        (options.describe_it, 0.3),
    ),
}


def _sameness(question: Question) -> str:
    """What two questions of a form share when only one of them may be asked of a picture.

    Yes or no is asked once a form: what is there offers fewer questions than what is not, so that leaving out repeated
    ones would leave more of "no".
    """
    if question.kind == "yesno":
        return ""
    return question.answer if question.kind == "short" and question.choices is None else question.text


class SceneSample:
    """A picture (RGB, size x size), a caption of one sentence, a dense description, and questions with answers; each
    is made when it is first asked for, the same whatever was asked for before."""

    def __init__(self, world: World, index: int) -> None:
        self._world, self._index = world, index
        self._rng, self._scene = world._scene(index)

    @cached_property
    def image(self) -> Image.Image:
        return render(self._scene, self._world.size)

    @cached_property
    def questions(self) -> list[Question]:
        return self._world._ask(self._scene, self._rng)

    @property
    def written(self) -> list[str]:
        """The words and numbers that stand in the picture."""
        return [part for item in self._scene.items if item.written for part in item.text.split()]

    @cached_property
    def caption(self) -> str:
        return caption(self._scene, self._wording("caption"))

    @cached_property
    def description(self) -> str:
        return description(self._scene, self._wording("description"))

    def _wording(self, of: str) -> Random:
        return Chance(f"{self._world.seed}/{self._world.split}/{self._index}/{of}")


class World:
    """A world of pictures, all drawn from one seed.

    `split` is one of SPLITS: "held-out" asks only what turns on combinations that the others never show. `kinds` gives
    weights to kinds of picture (see KINDS), `questions` the most asked of one picture. Sample `index` depends on
    (seed, split, index), on nothing else but the fonts at hand; the pictures of two splits are unrelated.
    Raises ValueError for an unknown split or kind, a size below 32 or no positive weight.
    """

    def __init__(
        self,
        seed: int,
        split: str = "train",
        size: int = SIDE,
        *,
        questions: int = 8,
        kinds: Mapping[str, float] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        if not 32 <= size <= 4096:
            raise ValueError(f"size is {size}; expected 32 px, below which no scene finds room, to 4096")
        weights = dict(KINDS if kinds is None else kinds)
        if unknown := set(weights) - set(KINDS):
            raise ValueError(f"unknown kinds of picture {sorted(unknown)}; expected some of {', '.join(KINDS)}")
        if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(f"kinds is {weights}; expected weights of 0 or more, one at least above 0")
        self.seed, self.split, self.size, self.questions = seed, split, size, questions
        self._kinds, self._weights = tuple(weights), tuple(weights.values())
        self._held_out = split == "held-out"

    def sample(self, index: int) -> SceneSample:
        """Sample number `index`, any integer."""
        return SceneSample(self, index)

    def marked(self, index: int) -> tuple[Image.Image, list[Mark]]:
        """The picture of sample `index` and what is drawn where, in the order of drawing; no words are made."""
        marks: list[Mark] = []
        return render(self.scene(index), self.size, marks), marks

    def text(self, index: int) -> str:
        """A passage that describes a scene in full and asks about it, without drawing: for language pre-training."""
        rng, scene = self._scene(index)
        passage = [description(scene, rng, orders=scene.kind in ("rows", "free", "crowd", "odd"))]
        passage += [f"question: {q.prompt(False)} answer: {q.answer}" for q in self._ask(scene, rng)]
        return "\n".join(passage)

    def scene(self, index: int) -> Scene:
        """The symbolic scene of sample `index`."""
        return self._scene(index)[1]

    def _scene(self, index: int) -> tuple[Random, Scene]:
        rng = Chance(f"{self.seed}/{self.split}/{index}")
        while True:
            kind = rng.choices(self._kinds, self._weights)[0]
            scene = _COMPOSERS[kind](rng, self._held_out)
            if not self._held_out or self._ask(scene, Chance(0)):
                return rng, scene

    def _ask(self, scene: Scene, rng: Random) -> list[Question]:
        """Up to `questions` different questions, forms drawn by weight."""
        deck = Deck(rng, scene.held_out, scene.background.base)
        deck.things = [i.name for i in scene.things]
        deck.taken = {i.name for i in scene.items if i.written}
        if scene.chart and scene.chart.labelled == "thing":
            deck.things += scene.chart.labels
        asker = Asker(scene, deck, rng)
        forms, weights = map(list, zip(*_FORMS[scene.kind]))
        bounds = list(accumulate(weights))
        asked: dict[tuple[str, str], Question] = {}
        # Equal groups leave fewer other questions: drawn among them, this one would come more often where it is true.
        if scene.kind == "crowd" and rng.random() < 0.5:
            question = seen.as_many(asker)
            if question and question.held_out == scene.held_out:
                asked[question.form, ""] = question
        for _ in range(4 * self.questions):
            if len(asked) == self.questions or not forms:
                break
            place = bisect(bounds, rng.random() * bounds[-1], 0, len(forms) - 1)
            question = forms[place](asker)
            if question is None:
                del forms[place], weights[place]
                bounds = list(accumulate(weights))
            elif question.held_out or not scene.held_out:
                asked.setdefault((question.form, _sameness(question)), question)
        return list(asked.values())
