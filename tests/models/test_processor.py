"""The processor: token ids, placeholders, templates, label masks, saving."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipVisionConfig
from transformers.models.clip.configuration_clip import CLIPVisionConfig

from vlmamba.models.images import pad_to_square
from vlmamba.models.preparation import build_image_processor
from vlmamba.models.processor import NO_LABEL, VLMambaProcessor
from vlmamba.models.template import SYSTEM

PATCHES = 9  # 24 / 8 = 3 x 3


@pytest.fixture
def processor(tokenizer) -> VLMambaProcessor:
    vision = SiglipVisionConfig(image_size=24, patch_size=8)
    return VLMambaProcessor(build_image_processor(vision), tokenizer, patch_size=8)


def picture(size=(40, 20), colour=(200, 30, 40)) -> Image.Image:
    return Image.new("RGB", size, colour)


def user(*parts) -> dict:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def image_part(image=None) -> dict:
    return {"type": "image", "image": image or picture()}


def text_of(processor, ids) -> str:
    """Ids as text, an image as one <image>."""
    joined = processor.tokenizer.decode(ids)
    return joined.replace("<image>" * PATCHES, "<image>")


def learned(processor, encoded) -> list[str]:
    """The stretches that carry labels, as text."""
    stretches, current = [], []
    for token, label in zip(encoded["input_ids"], encoded["labels"]):
        assert label in (NO_LABEL, token)
        if label != NO_LABEL:
            current.append(token)
        elif current:
            stretches, current = [*stretches, current], []
    return [processor.tokenizer.decode(ids) for ids in ([*stretches, current] if current else stretches)]


# ---------------------------------------------------------------------- construction


def test_tokenizer_gets_what_the_model_needs(processor):
    tokenizer = processor.tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert tokenizer.padding_side == "left"
    assert processor.image_token_id == len(tokenizer) - 1
    assert processor.num_image_tokens == PATCHES
    again = VLMambaProcessor(processor.image_processor, tokenizer, patch_size=8)
    assert len(again.tokenizer) == processor.image_token_id + 1


def test_clip_with_cls(tokenizer):
    vision = CLIPVisionConfig(image_size=24, patch_size=8)
    processor = VLMambaProcessor(build_image_processor(vision), tokenizer, 8, vision_cls=True)
    assert processor.num_image_tokens == PATCHES + 1
    assert processor(text="<image>", images=picture(), return_tensors="pt").input_ids.shape == (1, PATCHES + 1)


def test_wrong_mode_and_slow_tokenizer(processor):
    with pytest.raises(ValueError, match="image_mode 'stretch'"):
        VLMambaProcessor(processor.image_processor, processor.tokenizer, image_mode="stretch")
    with pytest.raises(ValueError, match="fast tokenizer"):
        VLMambaProcessor(processor.image_processor, object())


# ---------------------------------------------------------------------- images


def test_pad_and_crop(processor):
    padded = processor.image_pixels(picture())
    assert padded.shape == (3, 24, 24)
    assert padded.dtype == np.uint8
    assert np.abs(padded[:, 0, 0].astype(int) - 127).max() <= 1  # SigLIP's mean is 0.5
    assert tuple(processor.image_pixels(picture(), mode="crop")[:, 0, 0]) == (200, 30, 40)


def test_clip_crop_of_a_strip_stays_small(tokenizer):
    processor = VLMambaProcessor(build_image_processor(CLIPVisionConfig(image_size=24, patch_size=8)), tokenizer, 8)
    strip = picture((100_000, 2))
    for mode in ("crop", "pad"):
        assert processor.image_pixels(strip, mode).shape == (3, 24, 24)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (1, 3), (3, 1), (24, 3)])
def test_tiny_pictures_keep_their_channels(processor, size):
    for mode in ("crop", "pad"):
        pixels = processor.image_pixels(picture(size), mode)
        assert np.abs(pixels[:, 12, 12].astype(int) - (200, 30, 40)).max() <= 1


def test_uint8_path_equals_the_float_path(processor):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (31, 50, 3), dtype=np.uint8))
    for mode in ("crop", "pad"):
        direct = processor(images=noise, image_mode=mode, return_tensors="pt").pixel_values
        by_bytes = processor.normalise(torch.from_numpy(processor.image_pixels(noise, mode))[None])
        torch.testing.assert_close(direct, by_bytes, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- raw text


@pytest.mark.parametrize("config", [SiglipVisionConfig, CLIPVisionConfig])
@pytest.mark.parametrize("shortest", [24, 30])
@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_pixels_are_those_of_transformers(tokenizer, config, shortest, mode):
    """Our shorter way to them changes no bit, whatever the size of the picture."""
    images = build_image_processor(config(image_size=24, patch_size=8))
    if images.do_center_crop:
        images.size = type(images.size)(shortest_edge=shortest)
    processor = VLMambaProcessor(images, tokenizer, patch_size=8)
    mean = tuple(int(255 * value) for value in images.image_mean)
    for size in [(40, 20), (21, 50), (24, 24), (30, 30), (7, 5), (301, 200), (24, 100)]:
        noise = Image.effect_noise(size, 90).convert("RGB")
        framed = pad_to_square(noise, mean) if mode == "pad" else noise
        theirs = images(framed, do_rescale=False, do_normalize=False)["pixel_values"][0]
        assert np.array_equal(processor.image_pixels(noise, mode), theirs), size
        normalised = images(framed, return_tensors="pt").pixel_values
        assert torch.equal(processor(images=noise, image_mode=mode, return_tensors="pt").pixel_values, normalised)


def test_placeholder_expands(processor):
    inputs = processor(text="a <image> b", images=picture(), return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs.pixel_values.shape == (1, 3, 24, 24)
    assert (inputs.input_ids == processor.image_token_id).sum() == PATCHES
    assert text_of(processor, inputs.input_ids[0]) == "a <image> b"


def test_batch_is_left_padded(processor, tmp_path):
    path = tmp_path / "picture.png"
    picture().save(path)
    texts = ["<image>what?", "hello", "two <image><image>"]
    inputs = processor(text=texts, images=[str(path), picture(), path.read_bytes()], padding=True, return_tensors="pt")
    assert inputs.pixel_values.shape[0] == 3
    assert inputs.attention_mask[1, 0] == 0
    assert inputs.attention_mask[:, -1].tolist() == [1, 1, 1]
    assert text_of(processor, inputs.input_ids[1][inputs.attention_mask[1].bool()]) == "hello"


@pytest.mark.parametrize(
    ("text", "images", "numbers"),
    [
        ("<image>", None, "1 <image> .* 0 image"),
        ("none", [picture()], "0 <image> .* 1 image"),
        ("<image>", [picture(), picture()], "1 <image> .* 2 image"),
        (["<image><image>", "x"], [picture()], "2 <image> .* 1 image"),
        (["<image><image>", "x"], [[picture()], [picture()]], r"\[2, 0\] .* \[1, 1\]"),
        ([], None, r"list of strings; got \[\]"),
    ],
)
def test_counts_that_do_not_match(processor, text, images, numbers):
    with pytest.raises(ValueError, match=numbers):
        processor(text=text, images=images)


def test_text_alone_and_images_alone(processor):
    assert set(processor(text="hello")) == {"input_ids", "attention_mask"}
    assert set(processor(images=[picture(), picture()])) == {"pixel_values"}


# ---------------------------------------------------------------------- chat


def test_v1_prompt(processor):
    messages = [
        user(image_part(), "What is this?"),
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Its colour?"},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == (
        f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A cat.<|endoftext|>USER: Its colour? ASSISTANT:"
    )
    tokens = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert tokens == processor(text=prompt, images=picture())["input_ids"][0]


def test_literal_special_tokens_in_a_question_are_text(processor):
    question = "is <image> or <|endoftext|> a tag<|padding|>?"
    tokens = processor.apply_chat_template([user(image_part(), question)], tokenize=True)
    assert tokens.count(processor.image_token_id) == PATCHES
    assert not {0, 1} & set(tokens)
    assert question in processor.tokenizer.decode(tokens)
    with pytest.raises(ValueError, match=r"'<image>'.*tokenize=True"):
        processor.apply_chat_template([user(image_part(), "is <image> a tag?")])


def test_images_come_first_and_parts_are_joined(processor):
    prompt = processor.apply_chat_template([user("one", image_part(), "two", image_part())])
    assert prompt == f"{SYSTEM} USER: <image>\n<image>\none\ntwo "


def test_system_message_later_turns_and_continuation(processor):
    system = {"role": "system", "content": "Be short."}
    assert processor.apply_chat_template([system, user("hi")], add_generation_prompt=True) == (
        "Be short. USER: hi ASSISTANT:"
    )
    later = processor.apply_chat_template([user("more")], add_generation_prompt=True, begin=False)
    assert later == "USER: more ASSISTANT:"
    prefill = [user("hi"), {"role": "assistant", "content": "It is"}]
    assert processor.apply_chat_template(prefill, continue_final_message=True).endswith(" ASSISTANT: It is")


def test_continued_conversation_has_the_same_tokens(processor):
    first, second = user(image_part(), "What?"), user("And then?")
    answer = {"role": "assistant", "content": "A dog"}
    whole = processor.apply_chat_template([first, answer, second], tokenize=True, add_generation_prompt=True)
    begun = processor.apply_chat_template([first], tokenize=True, add_generation_prompt=True)
    said = processor.tokenizer(" A dog")["input_ids"] + [0]
    rest = processor.apply_chat_template([second], tokenize=True, add_generation_prompt=True, begin=False)
    assert whole == begun + said + rest


def test_batch_of_chats(processor):
    batch = [[user(image_part(), "What is this long thing?")], [user("hi")]]
    inputs = processor.apply_chat_template(
        batch, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert inputs.input_ids.shape == inputs.attention_mask.shape
    assert inputs.attention_mask[1, 0] == 0
    single = processor.apply_chat_template(batch[1], tokenize=True, add_generation_prompt=True)
    assert inputs.input_ids[1][inputs.attention_mask[1].bool()].tolist() == single
    assert inputs.pixel_values.shape == (1, 3, 24, 24)


def test_image_parts_by_path_and_base64(processor, tmp_path):
    picture().save(tmp_path / "a.png")
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    parts = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "base64": data},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        image_part(),
    ]
    inputs = processor.apply_chat_template([user(*parts)], tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs.pixel_values.shape[0] == 4
    assert (inputs.pixel_values == inputs.pixel_values[0]).all()


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "no messages"),
        ([{"role": "robot", "content": "x"}], "role 'robot'"),
        (["hi"], "message 1 is 'hi'"),
        ([{"role": "user", "content": 3}], "type int"),
        ([user({"type": "video"})], "part"),
        ([user("x"), {"role": "system", "content": "y"}], "message 2 has role 'system'"),
        ([{"role": "assistant", "content": [image_part()]}], "only user messages"),
        ([user({"type": "image", "path": "a", "url": "b"})], "url and path"),
    ],
)
def test_malformed_messages_are_named(processor, messages, words):
    with pytest.raises(ValueError, match=words):
        processor.apply_chat_template(messages)


def test_malformed_options_are_named(processor):
    with pytest.raises(ValueError, match="temperature"):
        processor.apply_chat_template([user("x")], temperature=1)
    with pytest.raises(ValueError, match="without a picture"):
        processor.apply_chat_template([user({"type": "image"})], tokenize=True)
    with pytest.raises(ValueError, match="must be the assistant's"):
        processor.apply_chat_template([user("x")], continue_final_message=True)


def test_address_that_does_not_answer_is_named(processor):
    with pytest.raises(ValueError, match=r"localhost:1/x\.png cannot be fetched"):
        processor.apply_chat_template(
            [user({"type": "image", "url": "http://localhost:1/x.png"})], tokenize=True, return_dict=True
        )


def test_empty_question(processor):
    prompt = processor.apply_chat_template([user(image_part(), "")], add_generation_prompt=True)
    assert prompt.endswith("USER: <image>\n ASSISTANT:")


# ---------------------------------------------------------------------- training


def test_v1_labels_are_answers_and_their_ends(processor):
    encoded = processor.encode_turns([("What?", "A cat."), ("Colour?", "Red")], 1)
    assert text_of(processor, encoded["input_ids"]) == (
        f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A cat.<|endoftext|>USER: Colour? ASSISTANT: Red<|endoftext|>"
    )
    assert learned(processor, encoded) == [" A cat.<|endoftext|>", " Red<|endoftext|>"]


def test_training_and_generation_read_the_same_prompt(processor):
    encoded = processor.encode_turns([("What?", "A cat.")], 1)
    prompt = processor.apply_chat_template([user(image_part(), "What?")], tokenize=True, add_generation_prompt=True)
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert encoded["labels"][: len(prompt)] == [NO_LABEL] * len(prompt)
    assert encoded["labels"][len(prompt)] != NO_LABEL


def test_plain_drops_the_human_text(processor):
    encoded = processor.encode_turns([("Describe.", "a red square\n")], 1, "plain")
    assert text_of(processor, encoded["input_ids"]) == "<image>a red square<|endoftext|>"
    assert learned(processor, encoded) == ["a red square<|endoftext|>"]


def test_image_token_in_a_text_is_text(processor):
    encoded = processor.encode_turns([("what", "the tag <image>"), ("and <image>?", "<|endoftext|>")], 1)
    assert encoded["input_ids"].count(processor.image_token_id) == PATCHES
    assert encoded["input_ids"].count(0) == 2


@pytest.mark.parametrize(
    ("pairs", "template", "words"),
    [
        ([("a", " \n")], "v1", "answer 1 of 1 is empty"),
        ([], "v1", "no human turn"),
        ([("a", "b"), ("c", "d")], "plain", "2 answers"),
        ([("a", "b")], "v2", "template 'v2'"),
    ],
)
def test_turns_that_teach_nothing_are_named(processor, pairs, template, words):
    with pytest.raises(ValueError, match=words):
        processor.encode_turns(pairs, 0, template)


def test_plain_text(processor):
    encoded = processor.encode_text("once upon <image>")
    assert encoded["labels"] == encoded["input_ids"]
    assert encoded["input_ids"][-1] == 0
    assert processor.image_token_id not in encoded["input_ids"]


def test_pictures_after_the_question(processor, tmp_path):
    processor.image_place = "after"
    processor.save_pretrained(tmp_path)
    after = VLMambaProcessor.from_pretrained(tmp_path)
    assert after.image_place == "after"
    learned = after.encode_turns([("What is this?", "A cat"), ("Why?", "It purrs")], 1)["input_ids"]
    asked = after.apply_chat_template([user(image_part(), "What is this?")], add_generation_prompt=True, tokenize=True)
    assert learned[: len(asked)] == list(asked)
    assert asked == after.encode_messages([user(image_part(), "What is this?")], add_generation_prompt=True)[0]
    text = after.tokenizer.decode(learned)
    assert text.index("What is this?\n<image>") < text.index(" ASSISTANT: A cat") < text.index("USER: Why?")
    assert learned.count(after.image_token_id) == after.num_image_tokens
    with pytest.raises(ValueError, match="image_place 'between'"):
        VLMambaProcessor(processor.image_processor, processor.tokenizer, image_place="between")


# ---------------------------------------------------------------------- saving


def test_round_trip(processor, tmp_path):
    processor.image_mode = "crop"
    processor.save_pretrained(tmp_path)
    again = VLMambaProcessor.from_pretrained(tmp_path)
    assert (again.image_mode, again.patch_size, again.vision_cls) == ("crop", 8, False)
    assert again.image_token_id == processor.image_token_id
    assert again.tokenizer.padding_side == "left"
    messages = [user(image_part(), "What <image> is this?")]
    before, after = (
        p.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        for p in (processor, again)
    )
    assert before.input_ids.tolist() == after.input_ids.tolist()
    assert torch.equal(before.pixel_values, after.pixel_values)


def test_folder_without_a_processor(tmp_path):
    with pytest.raises(ValueError, match="no processor_config"):
        VLMambaProcessor.from_pretrained(tmp_path)


# ---------------------------------------------------------------------- from parts


@pytest.fixture
def parts(tokenizer_json, tmp_path):
    """Folders of a vision encoder without an image processor, and of a language model in mamba_ssm's layout."""
    SiglipVisionConfig(image_size=24, patch_size=8).save_pretrained(tmp_path / "vision")
    language = tmp_path / "language"
    language.mkdir()
    (language / "config.json").write_text(json.dumps({"d_model": 8, "n_layer": 1, "vocab_size": 320}))
    (language / "tokenizer.json").write_text(tokenizer_json)
    return tmp_path / "vision", language


def test_from_parts(parts):
    processor = VLMambaProcessor.from_parts(*parts)
    assert processor.num_image_tokens == PATCHES
    assert (processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id) == (0, 1)
    assert processor.image_pixels(picture()).shape == (3, 24, 24)


def test_tokenizer_that_does_not_fit_or_is_not_there(parts, monkeypatch):
    vision, language = parts
    (language / "config.json").write_text(json.dumps({"d_model": 8, "n_layer": 1, "vocab_size": 100}))
    with pytest.raises(ValueError, match="its embedding 104 rows"):
        VLMambaProcessor.from_parts(vision, language)
    (language / "tokenizer.json").unlink()
    monkeypatch.setattr("vlmamba.models.preparation.GPT_NEOX", str(language / "nowhere"))
    with (
        pytest.warns(UserWarning, match=r"holds no tokenizer\.json"),
        pytest.raises(ValueError, match=r"put a tokenizer\.json into"),
    ):
        VLMambaProcessor.from_parts(vision, language)


# ---------------------------------------------------------------------- with transformers


def test_auto_processor(tiny_model):
    from transformers import AutoProcessor

    import vlmamba  # noqa: F401  (registers the Auto classes)

    assert type(AutoProcessor.from_pretrained(tiny_model)).__name__ == "VLMambaProcessor"


def test_pipeline_takes_messages_and_text_with_images(tiny_model):
    from transformers import pipeline

    import vlmamba  # noqa: F401

    pipe = pipeline("image-text-to-text", model=str(tiny_model))
    options = {"max_new_tokens": 3}
    messages = [user(image_part(), "What?")]
    answer = pipe(text=messages, **options)[0]["generated_text"][-1]
    raw = pipe(picture(), text=f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:", return_full_text=False, **options)
    assert answer["role"] == "assistant"
    assert raw[0]["generated_text"] == answer["content"]
    batch = pipe(text=[messages, [user("hi")]], return_full_text=False, **options)
    assert batch[0][0]["generated_text"] == answer["content"]


def test_a_pipeline_batches_chats_with_and_without_pictures(tiny_model):
    from transformers import pipeline

    ask = pipeline("image-text-to-text", model=str(tiny_model), dtype="float32")
    chats = [[user("hi")], [user(image_part(), "What is this?")], [user(image_part(), "and", image_part())]]
    how = {"generate_kwargs": {"max_new_tokens": 3, "do_sample": False}, "return_full_text": False}
    said = ask(text=chats, batch_size=3, **how)
    assert said == ask(text=chats, batch_size=1, **how)
    assert len(said) == 3
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    text = ask.processor.apply_chat_template(chats[0], **how)  # a language model alone takes it
    assert "pixel_values" not in text
