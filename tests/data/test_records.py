"""Reading LLaVA files, dirt included."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmamba.data.records import BadSampleError, llava_record, locate

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


@pytest.mark.parametrize(
    "asked", ["<image>\nWhat is it?", "What is it?\n<image>", "What <image>is it?", "<image>What is it?"]
)
def test_the_placeholder_may_stand_anywhere_in_the_question(asked: str) -> None:
    turns = [{"from": "human", "value": asked}, TURNS[1]]
    assert llava_record({"image": "a", "conversations": turns}, 0, FOLDER).turns == (("What is it?", "A dog."),)


def test_placeholders_in_later_turns_go_to_the_front_with_the_others() -> None:
    turns = [TURNS[0], TURNS[1], {"from": "human", "value": "<image> And this?"}, {"from": "gpt", "value": "A cat."}]
    record = llava_record({"image": ["a", "b"], "conversations": turns}, 0, FOLDER)
    assert record.turns == (("What is it?", "A dog."), ("And this?", "A cat."))
    assert record.images == (FOLDER / "a", FOLDER / "b")
    only_later = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}, *turns[2:]]
    assert llava_record({"image": "a", "conversations": only_later}, 0, FOLDER).turns[1] == ("And this?", "A cat.")


def test_elsewhere_the_placeholder_is_text() -> None:
    turns = [
        TURNS[0],
        {"from": "gpt", "value": "Write <image> there."},
        {"from": "human", "value": "Why <image>?"},
        TURNS[3],
    ]
    record = llava_record({"image": "a", "conversations": turns}, 0, FOLDER)
    assert record.turns == (("What is it?", "Write <image> there."), ("Why <image>?", "Brown."))
    plain = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, *turns[2:]]
    assert llava_record({"conversations": plain}, 0, None).turns[1] == ("Why <image>?", "Brown.")


def test_chat_form_and_several_images() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "Which is larger?"}, {"type": "image"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "The left."},
    ]
    record = llava_record({"images": ["a", "b"], "messages": messages}, 0, FOLDER)
    assert record.turns == (("Which is larger?", "The left."),)
    assert len(record.images) == 2


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "sample 7: is None"),
        ({"id": "q", "conversations": "hi"}, "q: conversations is 'hi'"),
        ({"id": "q", "conversations": ["hi"]}, "turn 1 is 'hi'"),
        ({"id": "q", "conversations": [{"from": "human", "value": 3}]}, "turn 1 says 3; expected text"),
        ({"id": "q", "image": {"a": 1}, "conversations": TURNS}, "expected a path or a list of paths"),
        ({"id": "q", "image": [None], "conversations": TURNS}, "expected a path or a list of paths"),
    ],
)
def test_what_has_another_shape_is_a_bad_sample(entry: object, words: str) -> None:
    with pytest.raises(BadSampleError, match=words):
        llava_record(entry, 7, FOLDER)


def test_a_file_of_another_suffix_is_found(tmp_path: Path) -> None:
    (tmp_path / "1.gif").touch()
    (tmp_path / "2.jpg").touch()
    (tmp_path / "2.png").touch()
    assert locate(tmp_path / "1.jpg") == tmp_path / "1.gif"
    assert locate(tmp_path / "2.png") == tmp_path / "2.png"
    assert locate(tmp_path / "3.jpg") == tmp_path / "3.jpg"
