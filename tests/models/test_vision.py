"""Vision towers: equal to transformers' own hidden states, at every layer, size and kind."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from vlmamba.models.vision import build_vision_tower

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 8,
}


def clip(image_size: int = 40) -> CLIPVisionModel:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(image_size=image_size, **SIZES)).eval()


def siglip(image_size: int = 40) -> SiglipVisionModel:
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(image_size=image_size, **SIZES)).eval()


def tower_of(model, layer=-2, cls=False):
    tower = build_vision_tower(model.config, layer, cls)
    picked, surplus = tower.select_weights(model.state_dict())
    assert surplus == []
    tower.model.load_state_dict(picked)
    return tower


@pytest.mark.parametrize("make", [clip, siglip])
@pytest.mark.parametrize("layer", [0, 1, 2, -2, -3, -4])
def test_equals_transformers_hidden_states(make, layer):
    model, pixels = make(), torch.randn(2, 3, 40, 40)
    expected = model(pixels, output_hidden_states=True).hidden_states[layer]
    patches, grid = tower_of(model, layer)(pixels)
    assert grid == (5, 5)
    torch.testing.assert_close(patches, expected[:, -25:], rtol=0, atol=0)


@pytest.mark.parametrize("make", [clip, siglip])
@pytest.mark.parametrize("layer", [3, -1])
def test_last_layer_is_last_hidden_state(make, layer):
    model, pixels = make(), torch.randn(2, 3, 40, 40)
    patches, _ = tower_of(model, layer)(pixels)
    torch.testing.assert_close(patches, model(pixels).last_hidden_state[:, -25:], rtol=0, atol=0)


def test_cls_comes_first_and_counts():
    model, pixels = clip(), torch.randn(1, 3, 40, 40)
    with_cls, without = tower_of(model, cls=True), tower_of(model)
    assert (with_cls.num_tokens, without.num_tokens) == (26, 25)
    tokens, grid = with_cls(pixels)
    assert grid == (5, 5)
    torch.testing.assert_close(tokens[:, 1:], without(pixels)[0], rtol=0, atol=0)
    assert tokens.shape == (1, 26, 32)


@pytest.mark.parametrize("make", [clip, siglip])
def test_other_and_rectangular_sizes_interpolate_positions(make):
    model, pixels = make(), torch.randn(1, 3, 24, 56)
    expected = model(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2]
    patches, grid = tower_of(model)(pixels)
    assert grid == (3, 7)
    torch.testing.assert_close(patches, expected[:, -21:], rtol=0, atol=0)


def test_size_that_patches_do_not_divide():
    tower = tower_of(siglip(image_size=46))  # as SigLIP-SO400M: 384 = 27 * 14 + 6
    patches, grid = tower(torch.randn(1, 3, 46, 46))
    assert grid == (5, 5)
    assert tower.num_tokens == patches.shape[1] == 25


def test_unused_blocks_are_not_built():
    names = tower_of(siglip(), layer=-2).model.state_dict()
    assert not any(name.startswith(("encoder.layers.2", "post_layernorm", "head")) for name in names)
    assert any(name.startswith("encoder.layers.1.") for name in names)
    assert tower_of(siglip(), layer=-1).model.post_layernorm is not None
    assert build_vision_tower(siglip().config).config.num_hidden_layers == 3  # the given config is left as it is


def test_weights_of_a_whole_clip_checkpoint():
    tower, model = build_vision_tower(clip().config), clip()
    state = {f"vision_model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.ones(())}
    state["vision_model.adapter.weight"] = torch.ones(2)
    picked, surplus = tower.select_weights(state)
    assert surplus == ["vision_model.adapter.weight"]
    tower.model.load_state_dict(picked)
    torch.testing.assert_close(tower.model.embeddings.class_embedding, model.embeddings.class_embedding)


def test_attention_is_sdpa_and_bf16_runs():
    tower = tower_of(siglip()).to(torch.bfloat16)
    assert tower.model.config._attn_implementation == "sdpa"
    patches, _ = tower(torch.randn(1, 3, 40, 40))
    assert patches.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("make", "kwargs", "words"),
    [
        (clip, {"layer": 4}, "vision_layer=4"),
        (clip, {"layer": -5}, "3 blocks"),
        (siglip, {"cls": True}, "no CLS token"),
    ],
)
def test_wrong_choices_are_named(make, kwargs, words):
    with pytest.raises(ValueError, match=words):
        build_vision_tower(make().config, **kwargs)


def test_wrong_inputs_are_named():
    tower = tower_of(clip())
    with pytest.raises(ValueError, match="smaller than one patch"):
        tower(torch.randn(1, 3, 4, 40))
    with pytest.raises(ValueError, match=r"\(3, 40, 40\)"):
        tower(torch.randn(3, 40, 40))
    with pytest.raises(ValueError, match="model_type is None"):
        build_vision_tower(object())
