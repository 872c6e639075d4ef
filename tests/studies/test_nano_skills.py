"""The study of nano's skills: scoring, controls and reports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vlmamba.data.scenes import Question


@pytest.fixture(scope="module")
def study() -> ModuleType:
    file = Path(__file__).parents[2] / "studies/nano_skills.py"
    spec = importlib.util.spec_from_file_location("nano_skills", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nano_skills"] = module
    spec.loader.exec_module(module)
    return module


def question(answer: str, kind: str = "short", form: str = "counting.number") -> Question:
    return Question("counting", "how many?", answer, kind=kind, form=form)


@pytest.mark.parametrize(
    ("kind", "answer", "reply", "points"),
    [
        ("short", "dog", " Dog.", 1),
        ("short", "dog", "dogs", 0),
        ("choice", "B", "b", 1),
        ("open", "a red dog", "a dog", 0.8),
        ("open", "a red dog", "", 0),
    ],
)
def test_score(study, kind, answer, reply, points) -> None:
    assert study.score(question(answer, kind), reply) == pytest.approx(points)


def test_questions_are_fresh_and_reproducible(study) -> None:
    one, two = study.ask("test", 30), study.ask("test", 30)
    assert [a.question for a in one] == [a.question for a in two]
    assert len({a.scene for a in one}) > 2
    assert [a.question for a in study.ask("held-out", 30)] != [a.question for a in one]


def test_shuffling_keeps_the_patches(study) -> None:
    (asked,) = study.ask("test", 1)
    moved = np.asarray(study.shuffled(asked))
    original = np.asarray(asked.image)
    assert not np.array_equal(moved, original)
    assert np.array_equal(np.sort(moved.reshape(-1)), np.sort(original.reshape(-1)))
    blank = study.Asked(0, 1, Image.new("RGB", (128, 128), "red"), question("1"))
    assert np.array_equal(np.asarray(study.shuffled(blank)), np.asarray(blank.image))


def test_majority_is_counted_on_other_questions(study) -> None:
    def asked(answer: str, form: str) -> object:
        return study.Asked(0, 1, None, question(answer, form=form))

    known = [asked("1", "a"), asked("1", "a"), asked("2", "a"), asked("7", "b")]
    assert study.majority([asked("1", "a"), asked("2", "a"), asked("7", "b"), asked("1", "c")], known) == [
        True,
        False,
        True,
        False,
    ]


def test_errors_take_the_questions_of_a_scene_together(study) -> None:
    def scores(scenes: list[int]) -> list:
        return [(study.Asked(s, 1, None, question("1")), float(s % 2)) for s in scenes]

    alone, together = study.summarise(scores(list(range(100)))), study.summarise(scores([0, 1] * 50))
    assert alone["accuracy"] == together["accuracy"] == 50
    assert alone["error"] == pytest.approx(5)
    assert together["error"] > 30


def test_reports(study) -> None:
    asked = study.ask("test", 60)
    columns = {name: study.by_group([(a, value) for a in asked]) for name, value in (("model", 1.0), ("blind", 0.25))}
    table = study.table(columns)
    assert table.startswith("| | questions | model | blind |")
    assert "| all | 60 | 100.0 ± 0.0 | 25.0 ± 0.0 |" in table
    assert study.bars(columns).count("<rect") >= 2 * len({a.question.skill for a in asked})
