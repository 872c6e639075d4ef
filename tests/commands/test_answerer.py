"""Answers in batches: the same as alone, with every picture read once."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmamba.commands.answerer import ModelAnswerer
from vlmamba.commands.load import Loaded, load
from vlmamba.evaluation.runner import Request

QUESTIONS = ("What is it?", "And what is that thing there in the corner?", "Is there a red square?\nAnswer yes or no.")
NEW = 6


CASES = [("tiny", "cpu"), ("nano", "cpu"), pytest.param(("nano", "cuda"), marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def loaded(request: pytest.FixtureRequest, tiny_model: Path) -> Iterator[Loaded]:
    name, device = request.param
    with pytest.MonkeyPatch.context() as patch:
        # Patches are embedded by a convolution, for which a GPU takes ten bits of each number where torch lets it: how
        # many pictures are read together would then show in the fourth digit.
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield load(str(tiny_model) if name == "tiny" else name, device, "float32")


@pytest.fixture
def answerer(loaded: Loaded) -> ModelAnswerer:
    return ModelAnswerer(loaded.model, loaded.processor, threads=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path | bytes | Image.Image]:
    """Three pictures of different shapes: a PNG file, the bytes of a JPEG, and a Pillow image."""
    folder, draw = tmp_path_factory.mktemp("pictures"), random.Random(1)
    images = [Image.new("RGB", size, colour) for size, colour in (((40, 30), "red"), ((30, 50), "blue"), ((9, 9), 0))]
    for image in images:
        for _ in range(60):
            place = draw.randrange(image.width), draw.randrange(image.height)
            image.putpixel(place, (draw.randrange(256), draw.randrange(256), 99))
    images[0].save(folder / "a.png")
    stream = io.BytesIO()
    images[1].save(stream, "JPEG")
    return [folder / "a.png", stream.getvalue(), images[2]]


def chat(text: str, *images: Any, system: str | None = None) -> list[dict[str, Any]]:
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, {"role": "user", "content": parts}]


def mixture(pictures: list[Any]) -> list[list[dict[str, Any]]]:
    """Pictures shared and alone, two in one question, text alone, other system sentences, earlier turns."""
    a, b, c = pictures
    earlier = [*chat("Where?", b), {"role": "assistant", "content": "There."}, *chat("And what?")]
    return [
        *(chat(question, a) for question in QUESTIONS),
        chat(QUESTIONS[0], b),
        chat(QUESTIONS[1], c, b),
        chat(QUESTIONS[2]),
        chat(QUESTIONS[0]),
        chat(QUESTIONS[1], a, system="Be brief."),
        chat(QUESTIONS[0], c, b),
        earlier,
        chat(QUESTIONS[2], a, system=""),
    ]


def alone(loaded: Loaded, messages: list[dict[str, Any]]) -> list[int]:
    """One prompt in one piece through transformers' `generate`."""
    inputs = loaded.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", image_mode="pad"
    ).to(loaded.device)
    end = loaded.processor.tokenizer.eos_token_id
    ids = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=end, pad_token_id=end)
    row = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return row[: row.index(end)] if end in row else row


def test_a_mixed_batch_gives_the_tokens_that_each_prompt_gives_alone(
    loaded: Loaded, answerer: ModelAnswerer, pictures: list[Any]
) -> None:
    chats = mixture(pictures)
    expected = [alone(loaded, messages) for messages in chats]
    assert answerer.tokens(chats, NEW) == expected
    assert len({tuple(row) for row in expected}) > 2
    for unlike in ((0, 3, 4, 5), (0, 3)):  # nothing in common; of one length too
        assert answerer.tokens([chats[i] for i in unlike], NEW) == [expected[i] for i in unlike]
    order = list(range(len(chats)))
    for seed, size in ((0, 4), (1, len(chats))):
        random.Random(seed).shuffle(order)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            assert answerer.tokens([chats[i] for i in part], NEW) == [expected[i] for i in part]


@pytest.fixture
def seen(loaded: Loaded) -> Iterator[list[int]]:
    """How many pictures the vision tower was given, call by call."""
    counts: list[int] = []
    hook = loaded.model.vision_tower.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    yield counts
    hook.remove()


def test_a_picture_is_read_once_for_all_its_questions(
    answerer: ModelAnswerer, pictures: list[Any], seen: list[int]
) -> None:
    a, b, c = pictures
    again = Image.frombytes(c.mode, c.size, c.tobytes())  # the same picture, opened anew
    answerer.tokens([chat(text, image) for text in QUESTIONS for image in (a, b, c, again)], 1)
    assert seen == [3]
    assert not answerer._pixels


def test_pictures_are_read_before_they_are_asked_about(
    answerer: ModelAnswerer, pictures: list[Any], tmp_path: Path
) -> None:
    place = tmp_path / "picture.png"
    pictures[2].save(place)
    requests = [Request(str(i), text, place, 3) for i, text in enumerate(QUESTIONS)]
    answerer.read_ahead(requests)
    for future in answerer._pixels.values():
        future.result(timeout=60)
    place.unlink()
    assert len(answerer.answer(requests)) == 3
    with pytest.raises(ValueError, match=r"no such image: .*picture\.png"):
        answerer.answer(requests)


def test_answers_end_at_a_stop_string(answerer: ModelAnswerer, pictures: list[Any]) -> None:
    chats = mixture(pictures)
    whole = answerer.converse(chats, NEW)
    stop = next(text for text in whole if len(text) > 1)[1]
    assert answerer.converse(chats, NEW, until=["\n\n\n", stop]) == [text.split(stop)[0].strip() for text in whole]


def test_likelihoods(loaded: Loaded, answerer: ModelAnswerer, pictures: list[Any]) -> None:
    chats = mixture(pictures)
    said = [" ".join(answerer.converse([messages], 2)) for messages in chats]
    texts = [text if i % 2 else "a red square" for i, text in enumerate(said)]
    for (found, _), messages, text in zip(answerer.likelihoods(chats, texts), chats, texts):
        ids, images = loaded.processor.encode_messages(messages, add_generation_prompt=True)
        target = loaded.processor.tokenizer(" " + text.strip(), split_special_tokens=True)["input_ids"]
        pixels = [loaded.processor.normalise(torch.from_numpy(loaded.processor.image_pixels(i))[None]) for i in images]
        with torch.no_grad():
            logits = loaded.model(
                input_ids=torch.tensor([ids + target], device=loaded.device),
                pixel_values=torch.cat(pixels).to(loaded.device) if pixels else None,
            ).logits[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).cpu().gather(1, torch.tensor(target)[:, None]).sum()
        assert found == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


def test_a_greedy_continuation_is_known_as_such(loaded: Loaded, answerer: ModelAnswerer, pictures: list[Any]) -> None:
    chats = mixture(pictures)
    tokenizer = loaded.processor.tokenizer
    for messages, row in zip(chats, answerer.tokens(chats, 2)):
        text = tokenizer.decode(row).strip()
        is_said = tokenizer(" " + text, split_special_tokens=True)["input_ids"] == row
        (_, greedy), (_, other) = answerer.likelihoods([messages] * 2, [text, "zebra " + text])
        assert greedy == is_said
        assert not other
