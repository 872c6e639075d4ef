"""VL-Mamba as a whole: images in prompts, generation in every mode, saving, transformers' Auto classes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    MambaConfig,
    SiglipVisionConfig,
)

import vlmamba
from vlmamba import VLMambaConfig, VLMambaForConditionalGeneration

IMAGE, PATCHES, VOCABULARY = 60, 12, 61


def tiny(vision: str = "siglip", **options) -> VLMambaForConditionalGeneration:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind = SiglipVisionConfig if vision == "siglip" else CLIPVisionConfig
    config = VLMambaConfig(
        vision_config=kind(image_size=16, patch_size=4, **sizes),
        text_config=MambaConfig(
            vocab_size=64, hidden_size=20, num_hidden_layers=2, state_size=8, pad_token_id=0, eos_token_id=1
        ),
        image_token_id=IMAGE,
        num_text_tokens=VOCABULARY,
        **options,
    )
    torch.manual_seed(0)
    return VLMambaForConditionalGeneration(config).eval()


def prompt(*parts: int | str, height: int = 16) -> torch.Tensor:
    """Token ids; "image" stands for the placeholders of one image (4 x 4 patches at 16 px)."""
    ids: list[int] = []
    for part in parts:
        ids += [IMAGE] * (4 * height // 4) if part == "image" else [int(part)]
    return torch.tensor([ids])


def pixels(n: int, seed: int = 0, height: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, height, 16, generator=torch.Generator().manual_seed(seed))


def padded(prompts: list[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    width = max(p.shape[1] for p in prompts)
    room = [(width - p.shape[1], 0) if side == "left" else (0, width - p.shape[1]) for p in prompts]
    ids = torch.cat([torch.nn.functional.pad(p, r) for p, r in zip(prompts, room)])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), r) for p, r in zip(prompts, room)])
    return ids, mask


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("connector", ["mlp", "vss-mlp", "vss-l2"])
@pytest.mark.parametrize(("vision", "cls"), [("siglip", False), ("clip", False), ("clip", True)])
@torch.no_grad()
def test_every_connector_over_every_tower(connector, vision, cls):
    model = tiny(vision, connector=connector, scan="csm", scan_weights="per-order", vision_cls=cls)
    ids = torch.cat([torch.full((1, 16 + cls), IMAGE), torch.tensor([[5, 6]])], 1)
    assert model(ids, pixels(1)).logits.shape == (1, 18 + cls, 64)


@torch.no_grad()
def test_image_takes_the_place_of_its_placeholders():
    model = tiny()
    ids, image = prompt(7, "image", 9), pixels(1)
    embeds, _ = model._with_images(ids, image)
    assert_close(embeds[:, 1:17], model.get_image_features(image))
    assert_close(model(inputs_embeds=embeds).logits, model(ids, image).logits)
    different = model(ids, pixels(1, seed=1)).logits
    assert_close(different[:, 0], model(ids, image).logits[:, 0])  # what stands before the image cannot see it
    assert (different[:, 17, :IMAGE] - model(ids, image).logits[:, 17, :IMAGE]).abs().max() > 1e-4


@torch.no_grad()
def test_rectangular_images():
    model = tiny()
    ids, image = prompt("image", 9, height=24), pixels(1, height=24)
    assert model(ids, image).logits.shape == (1, 25, 64)


def test_count_mismatch_names_both_numbers():
    model = tiny()
    with pytest.raises(ValueError, match="16 image placeholders, the 2 images give 32"):
        model(prompt("image"), pixels(2))
    with pytest.raises(ValueError, match="16 image placeholders, but no pixel_values"):
        model(prompt("image"))


@torch.no_grad()
def test_surplus_rows_are_never_generated():
    model = tiny()
    logits = model(prompt(5, 6)).logits
    assert torch.isinf(logits[..., VOCABULARY:]).all()
    assert torch.isinf(logits[..., IMAGE]).all()
    assert torch.isfinite(logits[..., :IMAGE]).all()
    model.train()
    loss = model(prompt(5, 6), labels=prompt(5, 6)).loss
    hidden = model.language_model.backbone(prompt(5, 6)).last_hidden_state
    masked = torch.nn.functional.cross_entropy(
        model.language_model.lm_head(hidden)[0, :1, :VOCABULARY], torch.tensor([6])
    )
    assert_close(loss, masked, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_more_tokens(tmp_path):
    """A tokenizer grows: old logits stay, new tokens can be generated, the placeholder never; also after saving."""
    model = tiny()
    ids = prompt(5, "image", 7)
    with torch.no_grad():
        before = model(ids, pixels(1)).logits
        model.resize_token_embeddings(70, mean_resizing=False)
        after = model(ids, pixels(1)).logits
    assert after.shape[-1] == 70
    assert torch.equal(after[..., :IMAGE], before[..., :IMAGE])
    assert torch.isneginf(after[..., IMAGE]).all()
    assert torch.isfinite(after[..., IMAGE + 1 :]).all()
    model.save_pretrained(tmp_path)
    again = VLMambaForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids, pixels(1)).logits, after)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_generation_equals_single_generation(side):
    model = tiny()
    prompts = [prompt(3, "image", 4, 5), prompt(9), prompt("image", 8, "image", 7), prompt(2, 3, 4)]
    images = pixels(3)
    ids, mask = padded(prompts, side)
    batch = model.generate(ids, attention_mask=mask, pixel_values=images, **GREEDY)
    assert torch.equal(batch[:, : ids.shape[1]], ids)
    own = [images[:1], None, images[1:], None]
    for b, (p, image) in enumerate(zip(prompts, own, strict=True)):
        single = model.generate(p, pixel_values=image, **GREEDY)
        assert batch[b, ids.shape[1] :].tolist() == single[0, p.shape[1] :].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_copies_of_a_prompt_take_all_its_images_along(side):
    model = tiny()
    prompts, images = [prompt("image", 8, "image", 7), prompt(5, "image", 6)], pixels(3)
    ids, mask = padded(prompts, side)
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    batch = model.generate(ids, attention_mask=mask, pixel_values=images, **options)
    assert torch.equal(batch[:, : ids.shape[1]], ids.repeat_interleave(2, 0))
    for b, (p, image) in enumerate(zip(prompts, (images[:2], images[2:]), strict=True)):
        single = model.generate(p, pixel_values=image, **options)
        assert batch[2 * b : 2 * b + 2, ids.shape[1] :].tolist() == single[:, p.shape[1] :].tolist()


@torch.no_grad()
def test_sampling_is_reproducible_and_streams():
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.extend(value.flatten().tolist())

        def end(self):
            self.seen.append("end")

    model, streamer = tiny(), Collect()
    options = {"max_new_tokens": 5, "do_sample": True, "eos_token_id": None}
    torch.manual_seed(3)
    first = model.generate(prompt("image", 8), pixel_values=pixels(1), streamer=streamer, **options)
    torch.manual_seed(3)
    assert model.generate(prompt("image", 8), pixel_values=pixels(1), **options).tolist() == first.tolist()
    assert streamer.seen == [*first[0].tolist(), "end"]


@torch.no_grad()
def test_generation_goes_on_from_a_returned_state():
    model = tiny()
    question, image = prompt("image", 8, 9), pixels(1)
    first = model.generate(question, pixel_values=image, return_dict_in_generate=True, **GREEDY)
    state, answered = first.past_key_values, first.sequences
    # The state has read all but the last token that was generated.
    more = torch.cat([answered[:, -1:], prompt(4, 5, 6)], 1)
    continued = model.generate(more, cache_params=state, **GREEDY)
    whole = model.generate(torch.cat([answered, prompt(4, 5, 6)], 1), pixel_values=image, **GREEDY)
    assert continued[0, 4:].tolist() == whole[0, -6:].tolist()


@torch.no_grad()
def test_compiled_forward_is_the_same():
    model, ids, image = tiny(), prompt("image", 8, 9), pixels(1)
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(ids, image).logits, model(ids, image).logits)


def test_placeholders_among_the_labels_have_no_loss():
    """`labels=input_ids`, as it is common in transformers."""
    model, ids = tiny(), prompt("image", 8, 9)
    labels = ids.masked_fill(ids == IMAGE, -100)
    assert_close(model(ids, pixels(1), labels=ids).loss, model(ids, pixels(1), labels=labels).loss)


@torch.no_grad()
def test_generation_without_a_cache_is_the_same():
    model = tiny()
    ids, image = prompt("image", 8, 9), pixels(1)
    cached = model.generate(ids, pixel_values=image, **GREEDY)
    assert model.generate(ids, pixel_values=image, use_cache=False, **GREEDY).tolist() == cached.tolist()


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
@torch.no_grad()
def test_save_and_load_through_auto_classes(auto, tmp_path):
    model = tiny(scan="csm", scan_weights="per-order")
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, VLMambaForConditionalGeneration)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids, image = prompt("image", 8), pixels(1)
    assert_close(again.eval()(ids, image).logits, model(ids, image).logits, rtol=0, atol=0)


@torch.no_grad()
def test_saved_names_of_the_language_model_are_transformers(tmp_path):
    from safetensors.torch import load_file

    tiny().save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "language_model.backbone.layers.0.mixer.A_log" in names
    assert "language_model.backbone.layers.1.mixer.dt_proj.bias" in names
    assert not [n for n in names if n.startswith("language_model.") and ".ssm." in n]


@torch.no_grad()
def test_device_map_and_bf16(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    again = VLMambaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu").eval()
    ids, image = prompt("image", 8), pixels(1)
    assert again.get_input_embeddings().weight.dtype == torch.bfloat16
    assert again.language_model.backbone.layers[0].mixer.ssm.A_log.dtype == torch.float32
    assert again.connector.vss.ssm.A_log.dtype == torch.float32
    logits = again(ids, image).logits[..., :IMAGE].float()
    assert_close(logits, model(ids, image).logits[..., :IMAGE], rtol=0.1, atol=0.05)


def test_unknown_configuration_key_is_named():
    with pytest.raises(ValueError, match=r"unknown configuration key 'conector'.*'connector'"):
        VLMambaConfig(conector="mlp")
    with pytest.raises(ValueError, match="scan='diagonal': expected one of bsm, csm"):
        VLMambaConfig(scan="diagonal")


def test_gradient_reaches_every_part_but_a_frozen_tower():
    model = tiny().train()
    model.vision_tower.requires_grad_(False)
    ids = prompt("image", 8, 9)
    model(ids, pixels(1), labels=ids.masked_fill(ids == IMAGE, -100)).loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("vision_tower"), name


@pytest.mark.parametrize(
    "first",
    ["", "import transformers", "from transformers import AutoConfig", "from transformers import AutoProcessor"],
)
def test_import_registers_without_loading_torch(first):
    code = f"""
import sys
{first}
import vlmamba
{"assert 'torch' not in sys.modules and 'transformers' not in sys.modules" if not first else ""}
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
config = AutoConfig.for_model("vlmamba")
for auto in (AutoModel, AutoModelForImageTextToText):
    assert auto._model_mapping[type(config)].__name__ == "VLMambaForConditionalGeneration"
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
assert PROCESSOR_MAPPING[type(config)].__name__ == "VLMambaProcessor"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert vlmamba.__all__ == [
        "__version__",
        "nano",
        "VLMambaConfig",
        "VLMambaForConditionalGeneration",
        "VLMambaProcessor",
        "VLMambaForCausalLM",
        "MambaState",
    ]
    assert AutoConfig.for_model("vlmamba", connector="mlp").connector == "mlp"
