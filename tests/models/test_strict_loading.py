"""Checkpoints that do not fit, are damaged, or mean harm: every one is refused in words, and none runs its code."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmamba.commands.load import load
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.models.weights import load_language, load_vision

HUGE_HEADER = struct.pack("<Q", 2**62) + b"{}"


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_model, tmp_path / "model of é")


def change(path, **values):
    content = json.loads(path.read_text())
    for name, value in values.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("connector.linear_out.bias"), r"missing connector\.linear_out\.bias"),
        (lambda t: t.update({"connector.more": torch.zeros(2)}), r"surplus connector\.more"),
        (lambda t: t.update({"connector.linear_out.bias": torch.zeros(2)}), r"linear_out\.bias is \(2,\), expected"),
    ],
)
def test_every_tensor_that_does_not_fit_is_named(folder, spoil, words):
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        VLMambaForConditionalGeneration.from_pretrained(folder)


def test_shapes_may_differ_where_that_is_asked_for(folder):
    tensors = load_file(folder / "model.safetensors") | {"connector.linear_out.bias": torch.zeros(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, found = VLMambaForConditionalGeneration.from_pretrained(
        folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.connector.linear_out.bias.shape == (32,)
    assert len(found["mismatched_keys"]) == 1


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("config.json", {"text_config__hidden_size": 10**9}, "text_config: hidden_size is 1000000000"),
        ("config.json", {"text_config__num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("config.json", {"text_config__num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ("config.json", {"vision_config__hidden_size": "big"}, "vision_config: hidden_size is 'big'"),
        ("config.json", {"text_config__time_step_rank": 1 << 24}, "time_step_rank is 16777216"),
        ("config.json", {"vision_config__num_channels": 1 << 20}, "num_channels is 1048576"),
        ("config.json", {"vision_config__image_size": 8192, "vision_config__patch_size": 1}, "more than 512 patches"),
        ("config.json", {"connector": "mlp", "connector_width": 1 << 26}, "connector_width=67108864"),
        ("config.json", {"text_config": [1]}, r"text_config is \[1\]"),
        ("config.json", {"vision_config__model_type": "nonsense"}, "nonsense"),
        ("config.json", {"image_token_id": 7}, "do not belong together"),
        ("processor_config.json", {"patch_size": 0}, "patch_size is 0"),
        (
            "processor_config.json",
            {"image_processor__size": {"height": 10**6, "width": 10**6}},
            "image_size is 1000000",
        ),
        ("processor_config.json", {"image_processor__image_processor_type": "Evil"}, "expected a CLIP or Siglip"),
    ],
)
def test_absurd_settings_are_named(folder, file, values, words):
    change(folder / file, **values)
    with pytest.raises(ValueError, match=words):
        load(str(folder), "cpu")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", b"[]", r"config\.json holds a list"),
        ("config.json", b"\xff", r"config\.json is not valid JSON"),
        ("config.json", b"[" * 100_000, r"config\.json is not valid JSON"),
        ("processor_config.json", b"[]", "cannot be loaded"),
        ("tokenizer.json", b"{broken", "cannot be loaded"),
        ("tokenizer.json", b"{}", "cannot be loaded"),
        ("model.safetensors", b"", "cannot be loaded"),
        ("model.safetensors", HUGE_HEADER, "cannot be loaded"),
    ],
)
def test_damaged_files_are_refused(folder, file, content, words):
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load(str(folder), "cpu")


def test_code_that_comes_with_a_checkpoint_does_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForImageTextToText": "evil.M"})
    change(folder / "processor_config.json", auto_map={"AutoProcessor": "evil.P"})
    load(str(folder), "cpu")
    change(folder / "config.json", model_type="evil")
    for read in (load, load_vision, load_language):
        with pytest.raises(ValueError, match="evil"):
            read(str(folder))
    assert not (tmp_path / "ran").exists()


def test_damaged_parts_are_refused(folder):
    language = json.loads((folder / "config.json").read_text())["text_config"]
    for name, value, words in [("state_size", -3, "state_size is -3"), ("vocab_size", 10**12, "vocab_size is 1000000")]:
        (folder / "config.json").write_text(json.dumps(language | {name: value}))
        with pytest.raises(ValueError, match=words):
            load_language(folder)
    (folder / "config.json").write_text(json.dumps(language))
    (folder / "model.safetensors").write_bytes(HUGE_HEADER)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_language(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weights": {}}')
    with pytest.raises(ValueError, match="holds no weight_map"):
        load_language(folder)


def test_chat_template_of_a_checkpoint_stays_in_its_sandbox(folder):
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    processor = load(str(folder), "cpu").processor
    with pytest.raises(ValueError, match="chat template cannot be rendered"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": "hi"}]}])
