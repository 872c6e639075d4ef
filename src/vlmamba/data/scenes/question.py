"""A question with its answer, and how things in a picture are referred to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import NamedTuple

from vlmamba.data.scenes.deck import Deck
from vlmamba.data.scenes.scene import Item, Scene
from vlmamba.data.scenes.vocabulary import held_out_pair, held_out_things, held_out_word

SKILLS = (
    "naming",
    "attributes",
    "existence",
    "counting",
    "comparison",
    "relations",
    "two-step",
    "reading",
    "numbers",
    "arithmetic",
    "odd-one-out",
    "lookup",
    "charts",
    "choice",
    "open",
)
SHORT = "\nAnswer the question using a single word or phrase."
FOUND = "\nReference OCR token: "
LETTER = "\nAnswer with the option's letter from the given choices directly."


class Question(NamedTuple):
    """`text` alone, without instruction or options; `answer` in lower case, for kind "choice" the option's letter.

    `choices`: the options of kind "choice"; for kind "short" the alternatives that the text itself names, if it does.
    `kind`: "short", "yesno", "choice" or "open". `form` names the type of question within the skill: the constant
    answer that a guesser would give belongs to it. `held_out`: it turns on a combination never seen in training.
    """

    skill: str
    text: str
    answer: str
    choices: tuple[str, ...] | None = None
    kind: str = "short"
    form: str = ""
    held_out: bool = False

    def prompt(self, instruct: bool = True, found: Sequence[str] = ()) -> str:
        """What a user would write: the text, lettered options where there are any, the words that a text reader `found`
        in the picture, as LLaVA's prompts for TextVQA name them, and the usual instruction."""
        text = self.text + (FOUND + ", ".join(found) if found else "")
        if self.kind == "choice" and self.choices:
            text += "".join(f"\n{letter}. {option}" for letter, option in zip("ABCDE", self.choices))
            return text + LETTER if instruct else text
        return text + SHORT if instruct and self.kind != "open" else text

    @property
    def guess(self) -> str:
        """The answer as a blind guesser counts it: the position among named alternatives, else the answer itself."""
        if self.kind == "short" and self.choices:
            return str(self.choices.index(self.answer))
        return self.answer


@dataclass
class Asker:
    """What a form of question needs: the scene, its deck, and a source of chance."""

    scene: Scene
    deck: Deck
    rng: Random

    def ask(
        self,
        form: str,
        wordings: Sequence[str],
        answer: str,
        about: Sequence[Item] = (),
        choices: Sequence[str] | None = None,
        kind: str = "short",
        **words: str,
    ) -> Question:
        """One of the wordings filled in. The skill is what stands before the dot of `form`."""
        text = self.rng.choice(wordings).format(**words)
        if self.rng.random() < 0.4:  # people write either way
            text = text[0].upper() + text[1:]
        if self.rng.random() < 0.25:
            text = text.replace("colour", "color")
        held_out = self.scene.held_out and turns_on_held_out(about)
        chosen = tuple(choices) if choices else None
        return Question(form.split(".")[0], text, answer, chosen, kind, form, held_out)

    def coin(self) -> bool:
        return self.rng.random() < 0.5

    def shuffled(self, items: Collection[Item]) -> list[Item]:
        return self.rng.sample(list(items), len(items))

    def reference(self, item: Item, hide: str = "") -> str:
        """A phrase that fits this item alone, "" where there is none. `hide` is what it must not give away:
        "colour", "shape", "size", "name" (all that names it) or "place"."""
        counts = self.scene.counts
        options: list[str] = []
        if item.kind == "thing" and hide != "name" and counts["thing", item.name] == 1:
            options.append(f"the {item.name}")
        elif item.kind == "shape" and hide != "name":
            options = self._shape_references(item, hide)
        elif item.written and hide != "name":
            options.append(f"the {item.kind} {item.name}")
        if (not options or self.rng.random() < 0.15) and hide != "place" and self.alone(item):
            noun = item.kind if item.kind in ("thing", "shape") else "text"
            options = [f"the {noun} {at(item.place)}"]
        return self.rng.choice(options) if options else ""

    def _shape_references(self, item: Item, hide: str) -> list[str]:
        counts = self.scene.counts
        options: list[str] = []
        if hide != "shape":
            if counts["shape", item.name] == 1:
                options.append(f"the {item.name}")
            elif hide != "size" and counts[item.size, item.name] == 1:
                options.append(f"the {item.size} {item.name}")
            if hide != "colour" and counts[item.colour, item.name] == 1:
                options.append(f"the {item.colour} {item.name}")
        if hide != "colour" and counts["colour", item.colour] == 1:
            options.append(f"the {item.colour} shape")
        return options

    def alone(self, item: Item) -> bool:
        """Whether the item stands clearly in a ninth of the picture that no other touches with its centre."""
        if not item.well_placed:
            return False
        column, row = int(item.x / 42.7), int(item.y / 42.7)
        left, right, top, bottom = column * 42.7 - 5, column * 42.7 + 47.7, row * 42.7 - 5, row * 42.7 + 47.7
        return not any(
            left < other.x < right and top < other.y < bottom for other in self.scene.items if other is not item
        )

    def referable(self, items: Sequence[Item], count: int, hide: str = "") -> list[tuple[Item, str]]:
        """`count` of the items at random, each with a phrase that fits it alone; fewer where there are not as many."""
        found: list[tuple[Item, str]] = []
        for item in self.shuffled(items):
            if phrase := self.reference(item, hide):
                found.append((item, phrase))
                if len(found) == count:
                    break
        return found


def at(place: str) -> str:
    """A place as one says it: "in the middle", "on the left", "at the top left"."""
    if place == "middle":
        return "in the middle"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def turns_on_held_out_pair(thing: Item, others: Sequence[Item]) -> bool:
    """Whether `thing` never shares a picture with one of the others in training."""
    return any(held_out_things(thing.name, other.name) for other in others)


def turns_on_held_out(about: Sequence[Item]) -> bool:
    """Whether these items show a colour of a shape, a pair of things or a word that is kept out of training."""
    for item in about:
        if item.kind == "shape" and held_out_pair(item.colour, item.name):
            return True
        if item.kind == "word" and len(item.name) > 1 and held_out_word(item.name):
            return True
    things = [i.name for i in about if i.kind == "thing"]
    return any(held_out_things(a, b) for a, b in combinations(things, 2))
