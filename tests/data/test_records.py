"""Reading LLaVA files, dirt included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmamba.data.records import BadSampleError, llava_length, llava_record, read_llava

TURNS = [
    {"from": "human", "value": "What is it?\n<image>"},
    {"from": "gpt", "value": "A dog."},
    {"from": "human", "value": "What colour?"},
    {"from": "gpt", "value": "Brown."},
]
FOLDER = Path("images")


def test_conversation_becomes_pairs() -> None:
    record = llava_record({"id": "a", "image": "coco/1.jpg", "conversations": TURNS}, 0, FOLDER)
    assert record.id == "a"
    assert record.turns == (("What is it?", "A dog."), ("What colour?", "Brown."))
    assert record.images == (FOLDER / "coco/1.jpg",)


def test_without_image() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert llava_record({"conversations": turns}, 7, None).images == ()
    assert llava_record({"conversations": turns}, 7, None).id == "7"


def test_a_picture_outlives_the_question_it_came_with() -> None:
    turns = [TURNS[0], {"from": "gpt", "value": ""}, TURNS[2], TURNS[3]]
    record = llava_record({"image": "x.jpg", "conversations": turns}, 0, FOLDER)
    assert record.turns == (("What colour?", "Brown."),)
    assert record.images


def test_first_turn_not_human_and_empty_answers_are_dropped() -> None:
    turns = [
        {"from": "gpt", "value": "Oops"},
        *TURNS[:2],
        {"from": "human", "value": "?"},
        {"from": "gpt", "value": " "},
    ]
    assert llava_record({"image": "x.jpg", "conversations": turns}, 0, FOLDER).turns == (("What is it?", "A dog."),)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"id": "q", "conversations": []}, "q: no human turn"),
        ({"id": "q", "conversations": TURNS}, "1 <image> in the first human turn, but 0 image"),
        ({"id": "q", "image": ["a", "b"], "conversations": TURNS}, "but 2 image"),
        ({"id": "q", "image": "a", "conversations": [TURNS[0], {"from": "gpt", "value": ""}]}, "no human turn"),
        ({"id": "q", "image": "a", "conversations": [TURNS[0], TURNS[0]]}, "no human turn"),
    ],
)
def test_bad_samples_say_why(entry: dict, words: str) -> None:
    with pytest.raises(BadSampleError, match=words):
        llava_record(entry, 0, FOLDER)


def test_image_without_a_folder() -> None:
    with pytest.raises(BadSampleError, match="names no image folder"):
        llava_record({"image": "a.jpg", "conversations": TURNS}, 0, None)


def test_json_and_json_lines(tmp_path: Path) -> None:
    entries = [{"id": "1"}, {"id": "2"}]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries) + "\n")
    assert read_llava(tmp_path / "a.json") == read_llava(tmp_path / "a.jsonl") == entries


@pytest.mark.parametrize(
    ("content", "words"), [("[{]", "line 1, column 3"), ('{"a": 1}', "expected a list"), ("[1]", "expected a list")]
)
def test_files_that_are_none(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_llava(tmp_path / "a.json")
    with pytest.raises(ValueError, match="no such file"):
        read_llava(tmp_path / "b.json")


def test_length_counts_text_and_images() -> None:
    entry = {"image": "a", "conversations": [{"from": "human", "value": "x" * 40}]}
    assert llava_length(entry, 100) == 110
