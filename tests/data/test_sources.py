"""Sources and their encoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dirt import BAD, GOOD
from PIL import Image

from vlmamba.data.encoding import Encoder
from vlmamba.data.records import BadSampleError, Record
from vlmamba.data.sources import LlavaConfig, LlavaSource, ScenesConfig, ScenesSource, SourceConfig, open_source


@pytest.mark.parametrize("what", ["caption", "description", "conversation"])
def test_scenes_with_a_picture(what) -> None:
    source = ScenesSource(ScenesConfig(seed=5, what=what, questions=4), 100)
    record = source.record(7)
    assert record == source.record(7)
    assert record.id == "scene-5-train-7"
    assert len(record.images) == 1
    assert record.text is None
    assert 1 <= len(record.turns) <= 4 if what == "conversation" else len(record.turns) == 1
    assert all(answer for _, answer in record.turns)
    assert source.supply.endless
    assert record.turns != source.record(8).turns


def test_scenes_come_again_when_asked_to() -> None:
    fresh, again = (ScenesSource(ScenesConfig(seed=5, again=again), 3) for again in (False, True))
    assert again.record(4) == fresh.record(1)
    assert fresh.record(4).id == "scene-5-train-4"


def test_scene_text() -> None:
    record = ScenesSource(ScenesConfig(what="text"), 10).record(3)
    assert record.text
    assert not record.images


def test_questions_come_in_several_ways() -> None:
    source = ScenesSource(ScenesConfig(seed=1), 100)
    asked = [question for i in range(20) for question, _ in source.record(i).turns]
    capital = np.mean([q[0].isupper() for q in asked])
    instructed = np.mean(["\nAnswer" in q for q in asked])
    assert 0.3 < capital < 0.7
    assert 0.1 < instructed < 0.5


def test_the_last_question_may_come_with_the_words_of_the_picture() -> None:
    source = ScenesSource(ScenesConfig(seed=3, kinds={"text": 1.0}), 60)
    named = 0
    for index in range(60):
        sample, asked = source.world.sample(index), [question for question, _ in source.record(index).turns]
        told = [" OCR token: " in question for question in asked]
        assert not any(told[:-1])
        assert told[-1] == (index % 2 == 1 and sample.questions[-1].kind in ("short", "yesno"))
        if told[-1]:
            named += 1
            line = f"\nReference OCR token: {', '.join(sample.written)}\nAnswer the question using"
            assert line in asked[-1]
            assert asked[-1].startswith(sample.questions[-1].text)
    assert named > 15
    assert not any(" OCR " in q for q, _ in ScenesSource(ScenesConfig(kinds={"crowd": 1.0}), 2).record(1).turns)


def test_every_kind_of_dirt(dirty: Path, encoder: Encoder) -> None:
    source = open_source(SourceConfig(llava=LlavaConfig(str(dirty / "data.json"), str(dirty)), weight=2))
    assert (source.supply.size, source.supply.weight, source.supply.endless) == (20, 2, False)
    records = [source.record(index) for index in range(len(GOOD))]
    examples = {record.id: encoder(record) for record in records}
    assert list(examples) == list(GOOD)
    said = {
        name: encoder.processor.tokenizer.decode(example.labels[example.labels >= 0])
        for name, example in examples.items()
    }
    end = "<|endoftext|>"
    assert said["plain"] == said["last"] == f" A red square{end}"
    assert said["html"] == f" yes{end} A tag, like <image>{end}"
    assert said["empty-answer"] == f" yes{end}"
    assert said["gpt-first"] == f" A square{end}"
    assert said["later"] == f" Hi{end} A red square{end}"
    assert np.array_equal(examples["plain"].input_ids, examples["last"].input_ids)
    assert np.array_equal(examples["suffix"].pixels[0], examples["content"].pixels[0])
    marks = {name: int((e.input_ids == encoder.processor.image_token_id).sum()) for name, e in examples.items()}
    assert marks == dict.fromkeys(GOOD, 4) | {"text": 0, "html": 0, "two": 8}
    assert all(len(e.pixels) * 4 == marks[name] for name, e in examples.items())
    assert {image.shape for e in examples.values() for image in e.pixels} == {(3, 16, 16)}
    for index, (name, (_, words)) in enumerate(BAD.items(), len(GOOD)):
        with pytest.raises(BadSampleError, match=f"^{name}: .*{words}"):
            encoder(source.record(index))
    with pytest.raises(BadSampleError, match="sample 19: is None"):
        source.record(len(GOOD) + len(BAD))


def test_llava_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds no samples"):
        LlavaSource(LlavaConfig(str(file)))
    file.write_text("[{}]")
    with pytest.raises(ValueError, match="no such folder of images"):
        LlavaSource(LlavaConfig(str(file), str(tmp_path / "nowhere")))


def test_picture_of_the_right_size_is_taken_as_it_is(encoder: Encoder) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    example = encoder(Record("a", (("What is this?", "yes"),), (image,)))
    assert np.array_equal(example.pixels[0], noise.transpose(2, 0, 1))
    assert np.array_equal(example.pixels[0], encoder.processor.image_pixels(image, "pad"))


def test_text_is_learned_whole(encoder: Encoder) -> None:
    example = encoder(Record("t", text="A red square"))
    assert np.array_equal(example.input_ids, example.labels)
    assert example.input_ids[-1] == encoder.processor.tokenizer.eos_token_id
