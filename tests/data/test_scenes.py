"""The procedural world: determinism, true answers, balance, what is held out, speed, and life without the font."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations, pairwise
from random import Random

import numpy as np
import pytest

from vlmamba.data.scenes import KINDS, SKILLS, SPLITS, Question, World, blind
from vlmamba.data.scenes.pages import PLOT, PLOT_LYING, TOP
from vlmamba.data.scenes.render import render
from vlmamba.data.scenes.scene import Item, Scene, offset
from vlmamba.data.scenes.sprites import available_things, shape_mask, text_mask, thing
from vlmamba.data.scenes.vocabulary import (
    COLOURS,
    FILLS,
    SHAPES,
    SIZE_PX,
    SIZES,
    THINGS,
    WRITTEN,
    held_out_pair,
    held_out_things,
    held_out_word,
    plural,
)

needs_things = pytest.mark.skipif(not available_things(), reason="needs the Noto Color Emoji font")
PLACES = r"(?:at the (?:top|bottom)(?: left| right)?|on the (?:left|right)|in the middle)"
OF = {"left of": "left", "right of": "right", "above": "above", "below": "below", "left": "left", "right": "right"}

FINGERPRINT = """
import hashlib
from vlmamba.data.scenes import World
for split in ("train", "held-out"):
    world = World(3, split)
    print(hashlib.sha256(b"".join(
        s.image.tobytes() + repr((s.caption, s.description, s.questions)).encode()
        for s in map(world.sample, range(12))
    )).hexdigest(), hashlib.sha256("".join(map(world.text, range(12))).encode()).hexdigest())
"""


def asked(split: str, count: int, seed: int = 5, **options) -> list[tuple[Scene, Question]]:
    """Questions with their scenes, nothing drawn."""
    world, found, index = World(seed, split, **options), [], 0
    while len(found) < count:
        rng, scene = world._scene(index)
        found += [(scene, question) for question in world._ask(scene, rng)]
        index += 1
    return found


@pytest.fixture(scope="module")
def train() -> list[tuple[Scene, Question]]:
    return asked("train", 16000)


def fits(item: Item, phrase: str) -> bool:
    """Whether `phrase` ("the small red star", "the shape at the top left") describes `item`; an independent reading."""
    phrase = phrase.removeprefix("the ")
    if place := re.search(PLACES + "$", phrase):
        if place.group().split(" ", 2)[-1].removeprefix("the ") != item.place:
            return False
        phrase = phrase[: place.start()].strip()
    if item.written:
        return phrase in (f"{item.kind} {item.name}", "text")
    if item.kind == "thing":
        return phrase in (item.name, "thing")
    words = phrase.split()
    known = {item.colour, item.size, item.name, "shape"}
    return all(word in known for word in words)


def the_one(scene: Scene, phrase: str) -> Item:
    found = [item for item in scene.items if fits(item, phrase)]
    assert len(found) == 1, (
        f"{phrase!r} fits {len(found)} of {[(i.kind, i.colour, i.size, i.name) for i in scene.items]}"
    )
    return found[0]


def plain(question: Question) -> str:
    text = question.text[0].lower() + question.text[1:]
    return text.replace("color", "colour").removesuffix(" please answer yes or no.")


def test_samples_do_not_depend_on_process_or_order() -> None:
    other = subprocess.run(
        [sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True
    ).stdout.split()
    mine = []
    for split in ("train", "held-out"):
        world = World(3, split)
        samples = {i: world.sample(i) for i in reversed(range(12))}
        raw = b"".join(
            s.image.tobytes() + repr((s.caption, s.description, s.questions)).encode()
            for s in (samples[i] for i in range(12))
        )
        mine += [
            hashlib.sha256(raw).hexdigest(),
            hashlib.sha256("".join(map(world.text, range(12))).encode()).hexdigest(),
        ]
    assert mine == other


def test_parts_of_a_sample_do_not_depend_on_each_other() -> None:
    parts = ("image", "caption", "description", "questions")
    one, other = World(3).sample(5), World(3).sample(5)
    forwards = {part: getattr(one, part) for part in parts}
    assert forwards == {part: getattr(other, part) for part in reversed(parts)}


def test_seeds_and_splits_differ() -> None:
    pictures = [World(seed, split).sample(0).image.tobytes() for seed in (0, 1) for split in SPLITS]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("size", [64, 128, 200])
def test_pictures_have_the_size_sidesfor(size: int) -> None:
    samples = [World(0, "train", size).sample(i) for i in range(20)]
    assert {s.image.size for s in samples} == {(size, size)}
    assert {s.image.mode for s in samples} == {"RGB"}
    assert [s.questions for s in samples] == [World(0, "train").sample(i).questions for i in range(20)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"size": 8}, "size is 8"),
        ({"kinds": {"opera": 1.0}}, "opera"),
        ({"kinds": {"rows": 0.0}}, "weights"),
    ],
)
def test_bad_arguments_are_named(change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        World(0, **change)


@needs_things
def test_the_world_is_as_rich_as_promised() -> None:
    scenes = [World(1).scene(i) for i in range(1500)]
    assert 180 <= len(THINGS) <= 240
    assert {s.kind for s in scenes} == set(KINDS)
    items = [i for s in scenes for i in s.items]
    assert {i.name for i in items if i.kind == "thing"} == set(THINGS)
    assert {(i.colour, i.name) for i in items if i.kind == "shape"} == {
        (c, s) for c in COLOURS for s in SHAPES if not held_out_pair(c, s)
    }
    assert {i.fill for i in items if i.kind == "shape"} == set(FILLS)
    letters = {i.px for i in items if i.written}
    assert min(letters) >= 12
    assert max(letters) == 40
    sides = {i.px for i in items if i.kind in ("thing", "shape")}
    assert min(sides) == 12
    assert max(sides) == 40
    assert np.mean([len(s.objects) >= 5 for s in scenes if s.kind in ("rows", "free", "crowd")]) > 0.7


def test_every_skill_and_kind_of_answer_is_asked(train: list[tuple[Scene, Question]]) -> None:
    assert {q.skill for _, q in train} <= set(SKILLS)
    if available_things():
        assert {q.skill for _, q in train} == set(SKILLS)
    assert {q.kind for _, q in train} == {"short", "yesno", "choice", "open"}
    for _, question in train:
        assert question.answer
        if question.kind != "choice":
            assert question.answer == question.answer.lower()
        else:
            assert question.choices is not None
            assert len(set(question.choices)) == len(question.choices)
            assert "ABCDE".index(question.answer) < len(question.choices)
            assert question.prompt().count("\n") == len(question.choices) + 1
        if question.kind == "short" and question.choices:
            assert question.answer in question.choices


def _counted(scene: Scene, noun: str) -> int:
    names = {plural(name): name for name in (*THINGS, *SHAPES)}
    *adjectives, last = noun.split()
    if noun in names and names[noun] in THINGS:
        return sum(i.kind == "thing" and i.name == names[noun] for i in scene.items)
    shapes = [i for i in scene.items if i.kind == "shape" and last in ("shapes", plural(i.name))]
    return sum(all(a in (i.colour, i.fill) for a in adjectives) for i in shapes)


def test_counts_are_true(train: list[tuple[Scene, Question]]) -> None:
    checked = 0
    for scene, question in train:
        text = plain(question)
        if question.form.startswith("counting.") and question.kind == "short":
            noun = re.match(
                r"(?:how many|count the) (.+?)(?: are there\?| can you see\?| are in the picture\?|\.)$", text
            )
            assert noun, text
            assert _counted(scene, noun[1]) == int(question.answer), text
            checked += 1
        elif question.form == "comparison.more":
            parts = re.match(r"(?:are there|can you see) (more|fewer) (.+) than (.+)\?", text)
            assert parts, text
            first, second = _counted(scene, parts[2]), _counted(scene, parts[3])
            assert first != second
            assert ((first > second) == (parts[1] == "more")) == (question.answer == "yes"), text
            checked += 1
    assert checked > 300


def test_existence_is_true(train: list[tuple[Scene, Question]]) -> None:
    checked = 0
    for scene, question in train:
        if not question.form.startswith("existence.") or question.form == "existence.word":
            continue
        words = re.search(r"\b(?:an?) (.+?)(?: in the (?:picture|image))?\?", plain(question))
        assert words, question.text
        noun = words[1].split()
        if words[1] in THINGS:
            there = any(i.kind == "thing" and i.name == words[1] for i in scene.items)
        else:
            there = any(i.kind == "shape" and all(w in (i.colour, i.name, "shape") for w in noun) for i in scene.items)
        assert there == (question.answer == "yes"), question.text
        checked += 1
    assert checked > 500


def test_sides_are_true_and_visible(train: list[tuple[Scene, Question]]) -> None:
    checked = 0
    for scene, question in train:
        text = plain(question)
        if question.form == "relations.side":
            parts = re.match(
                r"(?:in the picture, )?(?:is|does) (the .+?)(?: stand)? (left of|right of|above|below) (the .+)\?", text
            )
            assert parts, text
            # A phrase may itself hold "the shape on the left": take the split that names two items.
            one, two = the_one(scene, parts[1]), the_one(scene, parts[3])
            gap = offset(one, two, OF[parts[2]])
            assert abs(gap) >= 10
            assert (gap > 0) == (question.answer == "yes"), text
            checked += 1
        elif question.form == "comparison.larger":
            parts = re.match(r"(?:is|does) (the .+?)(?: look)? (larger|smaller) than (the .+)\?", text)
            assert parts, text
            one, two = the_one(scene, parts[1]), the_one(scene, parts[3])
            assert abs(one.px - two.px) >= 6
            assert ((one.px > two.px) == (parts[2] == "larger")) == (question.answer == "yes"), text
            checked += 1
    assert checked > 400


def test_attributes_are_true(train: list[tuple[Scene, Question]]) -> None:
    checked = 0
    for scene, question in train:
        if question.form in ("attributes.colour", "attributes.shape", "attributes.pattern", "attributes.size"):
            phrase = re.search(
                r"the (?:(?!colour of).)+?(?=,| have| filled| small|\?)", plain(question).replace("the colour of ", "")
            )
            assert phrase, question.text
            item = the_one(scene, phrase[0].removesuffix(" solid").strip())
            wanted = {"colour": item.colour, "shape": item.name, "pattern": item.fill, "size": item.size}
            assert question.answer == wanted[question.form.split(".")[1]], question.text
            checked += 1
    assert checked > 500


def _near(scene: Scene, item: Item, direction: str) -> Item:
    """The nearest item on one side: in slots within the same row or column."""
    others = [o for o in scene.items if o is not item and offset(o, item, direction) > 9]
    if scene.grid:
        across = "y" if direction in ("left", "right") else "x"
        others = [o for o in others if abs(getattr(o, across) - getattr(item, across)) <= 11]
    else:
        assert len(others) == 1
    return min(others, key=lambda o: offset(o, item, direction))


def test_two_steps_are_true(train: list[tuple[Scene, Question]]) -> None:
    way = r"(?:directly )?(left of|right of|above|below)"
    checked = 0
    for scene, question in train:
        if not question.form.startswith("two-step.walk"):
            continue
        parts = re.search(rf"{way} the (?:thing|shape|text) {way} (the .+?)(?: have)?\?", plain(question))
        assert parts, question.text
        start = the_one(scene, parts[3])
        goal = _near(scene, _near(scene, start, OF[parts[2]]), OF[parts[1]])
        wanted = goal.colour if question.form.endswith("colour") else goal.name
        assert question.answer == wanted, question.text
        checked += 1
    assert checked > 200


def test_tables_charts_and_sums_are_true(train: list[tuple[Scene, Question]]) -> None:
    checked = Counter()
    for scene, question in train:
        text = plain(question)
        if question.form.startswith("lookup.cell") and (parts := re.search(r"row (\d), column (\d)", text)):
            row, column = int(parts[1]) - 1, int(parts[2]) - 1
            (item,) = [i for i in scene.items if (i.row, i.column) == (row, column)]
            assert question.answer == (item.colour if item.kind == "patch" else item.name)
        elif question.form == "charts.value":
            label = re.search(r"(?:of|does) (?:the )?(.+?)(?: have)?\?", text)
            assert label
            assert scene.chart is not None
            chart = scene.chart
            names = chart.labels if label[1] in chart.labels else tuple(f"{c} bar" for c in chart.colours)
            assert chart.values[names.index(label[1])] == int(question.answer)
        elif question.form == "arithmetic.written":
            assert scene.items[0].text == scene.items[0].name
            one, sign, two = scene.items[0].name.split()
            assert int(one) + int(two) * (1 if sign == "+" else -1) == int(question.answer)
        elif question.form == "arithmetic.sum":
            assert sum(int(i.name) for i in scene.numbers) == int(question.answer)
        else:
            continue
        checked[question.form.split(".")[0]] += 1
    assert min(checked[k] for k in ("lookup", "charts", "arithmetic")) > 40


def test_bars_are_as_high_as_they_say() -> None:
    world = World(2, kinds={"chart": 1.0})
    for index in range(40):
        chart, picture = world.scene(index).chart, np.asarray(world.sample(index).image).astype(int)
        assert chart is not None
        left, top, right, bottom = PLOT_LYING if chart.horizontal else PLOT
        unit = (right - left if chart.horizontal else bottom - top) / TOP
        step = (bottom - top if chart.horizontal else right - left) / len(chart.values)
        for place, (colour, value) in enumerate(zip(chart.colours, chart.values)):
            middle = round((top if chart.horizontal else left) + step * (place + 0.5))
            line = picture[middle, round(left) :] if chart.horizontal else picture[: round(bottom), middle]
            filled = int((np.abs(line - COLOURS[colour]).sum(1) < 12).sum())
            assert abs(filled - unit * value) <= 3


def _visible(scene: Scene) -> list[float]:
    """The part of each item that no later one covers, from the masks that are pasted."""
    masks = []
    for item in scene.items:
        if item.kind == "thing":
            mask = thing(item.name, item.px).getchannel("A")
        elif item.kind == "shape":
            mask = shape_mask(item.name, item.fill, item.px)
        else:
            mask = text_mask(item.text, item.face, item.px)
        full = np.zeros((168, 168), bool)
        x, y = round(item.x - mask.width / 2) + 20, round(item.y - mask.height / 2) + 20
        full[y : y + mask.height, x : x + mask.width] = np.asarray(mask) > 96
        masks.append((full, item.kind == "shape" and shape_mask(item.name, "solid", item.px)))
    parts = []
    for place, (mask, _) in enumerate(masks):
        above = np.zeros_like(mask)
        for later, _ in masks[place + 1 :]:
            above |= later
        parts.append(1 - (mask & above).sum() / mask.sum())
        assert mask[20:-20, 20:-20].sum() >= 0.97 * mask.sum(), "an item leaves the picture"
    return parts


def test_everything_stays_visible() -> None:
    world = World(4, kinds={"free": 3.0, "rows": 1.0, "crowd": 1.0})
    parts = [part for index in range(250) for part in _visible(world.scene(index))]
    assert min(parts) >= 0.75
    if available_things():
        assert sum(part < 0.999 for part in parts) > 20, "no overlap at all"


def test_sizes_can_be_told_apart() -> None:
    for small, large in pairwise(SIZES):
        assert SIZE_PX[large][0] - SIZE_PX[small][1] >= 6


def test_colours_of_shapes_are_in_the_picture() -> None:
    world = World(6, kinds={"rows": 1.0})
    for index in range(60):
        scene = world.scene(index)
        picture = np.asarray(render(scene)).astype(int)
        for item in scene.shapes:
            left, top, right, bottom = (round(v) for v in item.box)
            patch = picture[top:bottom, left:right].reshape(-1, 3)
            share = (np.abs(patch - COLOURS[item.colour]).max(1) <= 2).mean()
            assert share > 0.08, (item.colour, item.fill, item.name, item.px)


def test_answers_are_balanced(train: list[tuple[Scene, Question]]) -> None:
    by_form: dict[str, Counter[str]] = {}
    for _, question in train:
        if question.kind == "yesno" or (question.kind == "short" and question.choices):
            by_form.setdefault(question.form, Counter())[question.guess] += 1
    for form, counts in by_form.items():
        total, sides = counts.total(), 3 if form == "attributes.size" else 2
        assert max(counts.values()) / total < 1 / sides + 2.2 * (0.25 / total) ** 0.5 + 0.02, (form, counts)
    counts = Counter(q.answer for _, q in train if q.form.startswith("counting.") and q.kind == "short")
    assert set(counts) == set("0123456")
    assert max(counts.values()) < 1.4 * min(counts.values())


def test_questions_on_a_side_do_not_name_a_place(train: list[tuple[Scene, Question]]) -> None:
    sides = [q.text for _, q in train if q.form in ("relations.which", "relations.side", "relations.place")]
    assert len(sides) > 100
    assert not [text for text in sides if re.search(r"(at the|on the|in the) (top|bottom|left|right|middle)", text)]


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_a_blind_guesser_stays_within_three_points(split: str, train: list[tuple[Scene, Question]]) -> None:
    known = [q for _, q in train]
    fresh = [q for _, q in asked(split, len(known) // (1 if split == "train" else 3), seed=77)]
    constant, guess = blind.majority(known, fresh), blind.guesser(known, fresh)
    sizes = Counter(q.skill for q in fresh)
    for skill, accuracy in guess.items():
        noise = 2 * (0.25 / sizes[skill]) ** 0.5
        assert accuracy <= constant[skill] + 0.03 + noise, (skill, accuracy, constant[skill], sizes[skill])


def test_the_guesser_finds_a_leak() -> None:
    leaky = [Question("x", f"is the {w} one here?", a, form="x.y") for w, a in [("red", "yes"), ("blue", "no")] * 50]
    assert blind.majority(leaky, leaky) == {"x": 0.5}
    assert blind.guesser(leaky, leaky) == {"x": 1.0}


def test_training_never_shows_what_is_held_out(train: list[tuple[Scene, Question]]) -> None:
    words = {w for w in WRITTEN if held_out_word(w)}
    pairs = {f"{c} {s}" for c in COLOURS for s in SHAPES if held_out_pair(c, s)}
    seen: set[int] = set()
    for scene, question in train:
        spoken = f"{question.prompt(False)} {question.answer}".lower()
        assert not any(f" {pair}" in f" {spoken}" for pair in pairs), spoken
        assert not words & set(re.findall(r"[a-z]+", spoken)), spoken
        assert not question.held_out
        if id(scene) in seen:
            continue
        seen.add(id(scene))
        names = [i.name for i in scene.items if i.kind == "thing"]
        if scene.chart and scene.chart.labelled == "thing":
            names += scene.chart.labels
        assert not any(held_out_things(a, b) for a, b in combinations(names, 2))
        assert not any(i.kind == "shape" and held_out_pair(i.colour, i.name) for i in scene.items)
        assert not any(i.kind == "word" and len(i.name) > 1 and held_out_word(i.name) for i in scene.items)


def test_the_held_out_split_asks_for_nothing_else() -> None:
    found = asked("held-out", 1500)
    assert all(q.held_out for _, q in found)
    shown = {
        "word": any(held_out_word(i.name) for s, _ in found for i in s.words),
        "pair": any(held_out_pair(i.colour, i.name) for s, _ in found for i in s.shapes),
        "things": not available_things()
        or any(held_out_things(a.name, b.name) for s, _ in found for a, b in combinations(s.things, 2)),
    }
    assert all(shown.values()), shown
    assert len({q.skill for _, q in found}) >= 8


def test_text_passages_hold_what_they_ask_for() -> None:
    world = World(8, kinds={"chart": 1.0, "table": 1.0})
    for index in range(60):
        first, *rest = world.text(index).split("\n")
        for answer in re.findall(r"answer: (\d+|[a-z]{4,})$", "\n".join(rest), re.M):
            if answer not in ("even", "does") and not answer.isdigit():
                assert answer in first or answer in COLOURS, (first, answer)


def test_sampling_is_fast() -> None:
    world = World(0)
    for index in range(150):
        world.sample(index)
    begin = time.process_time()
    for index in range(150, 350):
        world.sample(index)
    assert (time.process_time() - begin) / 200 < 0.0025 * 2  # twice the aim: this machine is shared


def test_without_the_font_there_are_shapes_only_and_it_is_said_once() -> None:
    code = """
import warnings
from vlmamba.data.scenes import sprites
sprites._EMOJI_FOLDERS = ()
from vlmamba.data.scenes import World
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for split in ("train", "held-out"):
        world = World(0, split)
        for index in range(150):
            assert not world.scene(index).things and world.sample(index).questions is not None
print(len(said), "NotoColorEmoji" in str(said[0].message), "VLMAMBA_EMOJI_FONT" in str(said[0].message))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": ""}, check=False, timeout=60
    )
    assert done.stdout.split() == ["1", "True", "True"], done.stderr


def test_a_bad_font_file_is_named() -> None:
    code = "from vlmamba.data.scenes import World; World(0).sample(0)"
    env = {"PATH": "", "VLMAMBA_EMOJI_FONT": "/no/such/font.ttf"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert "ValueError: VLMAMBA_EMOJI_FONT='/no/such/font.ttf'" in done.stderr


def test_an_independent_stream_for_every_index() -> None:
    assert Random("0/train/1").random() != Random("0/train/2").random()
    assert len({World(0).sample(i).image.tobytes() for i in range(50)}) == 50
