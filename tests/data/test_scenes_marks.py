"""What the renderer says of its pictures: true to the pixel, topmost first, letters in reading order."""

from __future__ import annotations

from itertools import pairwise
from math import hypot

import numpy as np
import pytest

from vlmamba.data.collate import NO_LABEL
from vlmamba.data.scenes import FIELDS, Mark, World
from vlmamba.data.scenes.marks import BAR_ENDS, CHARACTERS, patch_classes
from vlmamba.data.scenes.render import render
from vlmamba.data.scenes.scene import Background, Item, Scene
from vlmamba.data.scenes.sprites import text_size
from vlmamba.data.sources import ScenesConfig, ScenesSource

GROUND = Background("plain", (246, 244, 240), (0, 0, 0), 0)


def told(classes: np.ndarray, field: str) -> np.ndarray:
    """The names in one field, (16, 16)."""
    names = np.array(FIELDS[field], dtype=object)
    return names[classes[list(FIELDS).index(field)]].reshape(16, 16)


def written(text: str, px: int, face: int = 0, x: float = 64, y: float = 61) -> Scene:
    width, height = text_size(text, face, px)
    item = Item("word", text.lower(), "blue", px=px, x=x, y=y, width=width, height=height, text=text, face=face)
    return Scene("text", GROUND, [item])


def shape(name: str, colour: str, px: int, x: float, y: float, fill: str = "solid", size: str = "large") -> Item:
    return Item("shape", name, colour, fill, size, px, x, y, px, px)


def marks_of(scene: Scene, size: int = 128) -> list[Mark]:
    marks: list[Mark] = []
    render(scene, size, marks)
    return marks


def classes_of(scene: Scene) -> np.ndarray:
    return patch_classes(marks_of(scene), 128, 16, 16)


def test_marks_change_no_pixel() -> None:
    world = World(8)
    assert all(world.marked(i)[0].tobytes() == world.sample(i).image.tobytes() for i in range(40))


def test_names_of_a_field_differ() -> None:
    assert all(len(set(names)) == len(names) and names[0] == "" for names in FIELDS.values())
    assert len(FIELDS["what"]) == 282


@pytest.mark.parametrize("size", [128, 200])
def test_an_item_is_where_its_marks_say(size: int) -> None:
    """Without one item a picture differs inside the boxes of its marks only, and in most of what they cover."""
    world = World(4, kinds={"rows": 1, "free": 1, "text": 1, "table": 1})
    for index in range(30):
        scene = world.scene(index)
        marks: list[Mark] = []
        whole = np.asarray(render(scene, size, marks)).astype(int)
        last = scene.items.pop()
        own = marks[len(marks_of(scene, size)) :]
        assert len(own) == (len(last.text.replace(" ", "")) if last.written else 1)
        changed = (np.asarray(render(scene, size)) != whole).any(-1)
        boxes = np.zeros_like(changed)
        for mark in own:
            left, top, right, bottom = mark.box
            boxes[int(top) : int(bottom), max(0, int(left) - 3) : int(right) + 4] = True
            if mark.cover is not None and last.fill == "solid":
                height, width = mark.cover.shape
                part = changed[int(top) : int(top) + height, int(left) : int(left) + width]
                assert part[mark.cover].mean() > 0.9
        assert changed.any()
        assert not changed[~boxes].any()


@pytest.mark.parametrize("face", [0, 1, 4])
@pytest.mark.parametrize("px", [12, 17, 26, 40])
@pytest.mark.parametrize("text", ["World", "ILLUM", "jigsaw", "3 + 4"])
def test_characters_spell_the_text(text: str, px: int, face: int) -> None:
    classes = classes_of(written(text, px, face))
    first, second = told(classes, "what"), told(classes, "next")
    rows = np.unique(np.argwhere(first != "")[:, 0])
    assert len(rows) == 1  # however many rows of patches tall letters span
    read = "".join(a + b for a, b in zip(first[rows[0]], second[rows[0]], strict=True))
    assert read == text.lower().replace(" ", "")
    assert set(told(classes, "colour")[first != ""]) == {"blue"}
    assert set(told(classes, "size")[first != ""]) == {"small" if px < 18 else "medium" if px < 27 else "large"} or (
        px == 17
    )
    assert np.array_equal(told(classes, "centre") == "here", first != "")


@pytest.mark.parametrize("px", [12, 30])
def test_a_character_is_where_it_is_drawn(px: int) -> None:
    """Its ink lies within its box, give or take a pixel of overhang."""
    scene = written("Hawk", px)
    marks = marks_of(scene)
    for number, mark in enumerate(marks):
        shown = written("Hawk"[: number + 1], px)
        # The same word cut off after this letter, beginning at the same place.
        left = marks[0].box[0]
        shorter = marks_of(shown)
        shift = left - shorter[0].box[0]
        assert abs(shorter[-1].box[0] + shift - mark.box[0]) <= 1.5
        assert abs(shorter[-1].box[2] + shift - mark.box[2]) <= 1.5
    ink = (np.asarray(render(scene)) != GROUND.base).any(-1).any(0)
    columns = np.flatnonzero(ink)
    assert abs(columns[0] - marks[0].box[0]) <= 3
    assert abs(columns[-1] - marks[-1].box[2]) <= 3
    assert all(a.box[2] == pytest.approx(b.box[0]) for a, b in pairwise(marks))


def test_what_lies_on_top_is_told() -> None:
    below, above = shape("square", "red", 40, 60, 60), shape("circle", "blue", 26, 76, 76, "striped", "medium")
    classes = classes_of(Scene("free", GROUND, [below, above]))
    what, colour, fill = told(classes, "what"), told(classes, "colour"), told(classes, "fill")
    assert (what[9, 9], colour[9, 9], fill[9, 9]) == ("circle", "blue", "striped")
    assert (what[6, 6], colour[6, 6], fill[6, 6]) == ("square", "red", "solid")
    assert what[0, 0] == what[9, 4] == ""
    assert [tuple(at) for at in np.argwhere(told(classes, "centre") == "here")] == [(7, 7), (9, 9)]
    assert set(told(classes, "size")[what == "circle"]) == {"medium"}


def test_a_hidden_middle_is_told_all_the_same() -> None:
    big, small = shape("circle", "red", 40, 60, 60), shape("star", "green", 14, 64, 64, size="small")
    classes = classes_of(Scene("free", GROUND, [big, small]))
    assert (told(classes, "what")[7, 7], told(classes, "colour")[7, 7]) == ("circle", "red")
    assert told(classes, "what")[8, 8] == "star"


def test_where_the_middle_is_and_how_many_there_are() -> None:
    items = [
        shape("star", "red", 30, 20, 100),
        shape("star", "blue", 24, 100, 30, "dotted", "medium"),
        shape("heart", "red", 24, 60, 60, size="medium"),
        Item("thing", "dog", size="large", px=30, x=104, y=104, width=30, height=30),
        Item("word", "red", "red", px=14, x=30, y=20, width=30, height=14, text="red"),
    ]
    classes = classes_of(Scene("free", GROUND, items))
    what = told(classes, "what")
    for item in items[:4]:
        where = (what == item.name) & ((told(classes, "colour") == item.colour) | (item.kind == "thing"))
        assert where.sum() > 3
        assert set(told(classes, "row")[where]) == {f"line {int(item.y / 8) + 1}"}
        assert set(told(classes, "column")[where]) == {f"line {int(item.x / 8) + 1}"}
        assert set(told(classes, "named")[where]) == {"2" if item.name == "star" else "1"}
        counts = {"red": "2", "blue": "1", "": ""}
        assert set(told(classes, "coloured")[where]) == {counts[item.colour]}
        counts = {"solid": "2", "dotted": "1"}
        assert set(told(classes, "filled")[where]) == {"" if item.kind == "thing" else counts[item.fill]}
    letters = np.isin(what, CHARACTERS)
    assert {str(told(classes, field)[letters][0]) for field in ("named", "coloured", "filled")} == {""}
    assert list(told(classes, "column")[letters]) == [f"line {c + 1}" for c in np.argwhere(letters)[:, 1]]
    crowd = classes_of(Scene("crowd", GROUND, [shape("star", "red", 12, 8 + 16 * i, 60) for i in range(8)] * 2))
    assert set(told(crowd, "named")[told(crowd, "what") == "star"]) == {"9 or more"}


def test_who_stands_beside_whom() -> None:
    """In slots the label is what the questions ask for; elsewhere it is the nearest that is clearly to that side."""
    world, sides = World(7, kinds={"rows": 0.5, "crowd": 0.5}), ("left", "right", "above", "below")
    for index in range(40):
        scene, classes = world.scene(index), patch_classes(world.marked(index)[1], 128, 16, 16)
        named = {field: told(classes, field) for field in (*sides, "what", "nearest")}
        for item in scene.objects:
            at = int(item.y / 8), int(item.x / 8)
            if named["what"][at] != item.name:
                continue
            for side, other in scene.beside[id(item)].items():
                if other in scene.objects:
                    assert named[side][at] == other.name
            others = [o for o in scene.objects if o is not item]
            closest = min((hypot(o.x - item.x, o.y - item.y), o.name) for o in others)
            if all(hypot(o.x - item.x, o.y - item.y) > closest[0] + 2 for o in others if o.name != closest[1]):
                assert named["nearest"][at] == closest[1]
    items = [shape("star", "red", 20, 20, 20), shape("heart", "red", 20, 60, 30), shape("circle", "red", 20, 100, 100)]
    items.append(Item("word", "up", "red", px=14, x=20, y=60, width=30, height=14, text="up"))
    classes = classes_of(Scene("free", GROUND, items))
    what = told(classes, "what")
    expected = {
        "star": ["", "heart", "", "", "heart"],
        "heart": ["star", "", "", "", "star"],  # the circle is neither clearly to its right nor clearly below
        "circle": ["", "", "", "", "heart"],
        "u": [""] * 5,
    }
    for name, names in expected.items():
        assert [set(told(classes, field)[what == name]) for field in (*sides, "nearest")] == [{n} for n in names]


def test_ends_of_bars() -> None:
    world = World(2, kinds={"chart": 1.0})
    for index in range(40):
        scene = world.scene(index)
        assert scene.chart is not None
        classes = classes_of(scene)
        what, colour = told(classes, "what"), told(classes, "colour")
        ends = [tuple(at) for at in np.argwhere(np.isin(what, BAR_ENDS))]
        ends.sort(key=lambda at: at[0] if scene.chart.horizontal else at[1])
        assert [what[at] for at in ends] == [f"bar {value}" for value in scene.chart.values]
        assert [colour[at] for at in ends] == list(scene.chart.colours)
        labels = set(scene.chart.labels if scene.chart.labelled == "thing" else "".join(scene.chart.labels))
        assert labels <= set(what.flat) | set(told(classes, "next").flat)


def test_tables_tell_every_cell() -> None:
    world = World(2, kinds={"table": 1.0})
    for index in range(40):
        scene = world.scene(index)
        classes = classes_of(scene)
        what, centre = told(classes, "what"), told(classes, "centre")
        for item in scene.items:
            at = int(item.y / 8), int(item.x / 8)
            if item.kind == "thing":
                near = slice(int((item.y - 0.5) / 8), at[0] + 1), slice(int((item.x - 0.5) / 8), at[1] + 1)
                assert ((what[near] == item.name) & (centre[near] == "here")).sum() == 1
            elif item.kind == "patch":
                assert (what[at], told(classes, "colour")[at]) == ("patch", item.colour)
            else:
                assert set(item.name) <= set(what[at[0] - 1 : at[0] + 2].flat) | set(told(classes, "next").flat)


def test_almost_nothing_is_left_out() -> None:
    """Three narrow letters can share a patch; that is one in thousands."""
    world, asked, found = World(3), 0, 0
    for index in range(300):
        marks = world.marked(index)[1]
        classes = patch_classes(marks, 128, 16, 16)
        asked += sum(mark.centred for mark in marks)
        found += int((told(classes, "centre") != "").sum() + (told(classes, "next") != "").sum())
    assert 0.998 * asked < found <= asked


def test_an_example_of_patches(encoder) -> None:
    source = ScenesSource(ScenesConfig(seed=6, what="patches"), 10)
    example, marks = encoder(source.record(3)), source.record(3).marks
    assert example.labels.shape == example.input_ids.shape == (1 + len(FIELDS) * 4,)
    assert example.labels[0] == NO_LABEL
    assert np.array_equal(example.labels[1:], patch_classes(marks, 128, 2, 2).reshape(-1))
    assert [image.shape for image in example.pixels] == [(3, 16, 16)]


def test_characters_are_those_of_the_world() -> None:
    world = World(1, kinds={"text": 1, "table": 1})
    texts = {c for index in range(300) for item in world.scene(index).items for c in item.text.lower()} - {" "}
    assert texts == set(CHARACTERS)
