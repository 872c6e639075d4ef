"""Checkpoints from elsewhere: both namings in and out, composition from parts, and hostile or broken files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, MambaConfig, MambaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from vlmamba import VLMambaForConditionalGeneration
from vlmamba.models.names import to_original
from vlmamba.models.weights import language_config, load_language, load_vision, original_config

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture
def language() -> MambaForCausalLM:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=24, num_hidden_layers=2, state_size=8)).eval()


@pytest.fixture
def original(language, tmp_path):
    """A folder as the state-spaces repositories have it: config.json and pytorch_model.bin only."""
    folder = tmp_path / "original"
    folder.mkdir()
    tensors = {n.replace("embeddings", "embedding"): t for n, t in language.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    config = {"d_model": 24, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"d_state": 8}, "rms_norm": True}
    config |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def siglip(tmp_path):
    torch.manual_seed(1)
    SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=4, **SIZES)).save_pretrained(tmp_path / "siglip")
    return tmp_path / "siglip"


@torch.no_grad()
def test_original_checkpoint_gives_the_same_logits(language, original):
    ours, tokens = load_language(original)
    ids = torch.arange(20)[None]
    assert tokens == 61
    assert_close(ours.eval()(ids).logits, language(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_original_names_round_trip(language, original, tmp_path):
    ours, tokens = load_language(original)
    folder = tmp_path / "back"
    folder.mkdir()
    save_file({n: t.clone() for n, t in to_original(ours.state_dict()).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(original_config(ours.config, tokens)))
    again, tokens_again = load_language(folder)
    assert tokens_again == tokens
    before = torch.load(original / "pytorch_model.bin", weights_only=True)
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert_close(after[name], tensor, rtol=0, atol=0)
    for name, p in again.named_parameters():
        assert_close(p, ours.get_parameter(name), rtol=0, atol=0)


@torch.no_grad()
def test_transformers_checkpoint_sharded(language, tmp_path):
    language.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours, _ = load_language(tmp_path)
    ids = torch.arange(20)[None]
    assert_close(ours.eval()(ids).logits, language(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_from_parts_holds_both_parts_exactly(original, siglip):
    model = VLMambaForConditionalGeneration.from_parts(
        vision=siglip, language=original, connector="vss-l2", scan="bsm"
    ).eval()
    assert model.config.image_token_id == model.config.num_text_tokens == 61
    tower = SiglipVisionModel.from_pretrained(siglip).eval()
    pixels = torch.randn(2, 3, 16, 16)
    expected = tower(pixels, output_hidden_states=True).hidden_states[-2]
    assert_close(model.vision_tower(pixels)[0], expected, rtol=1e-5, atol=1e-5)
    alone, _ = load_language(original)
    ids = torch.arange(2, 20)[None]
    logits = model(ids).logits
    assert_close(logits[..., :61], alone.eval()(ids).logits[..., :61])
    again = VLMambaForConditionalGeneration.from_parts(vision=siglip, language=original, dtype=torch.bfloat16)
    assert again.connector.linear_in.weight.dtype == torch.bfloat16
    assert again.connector.vss.ssm.A_log.dtype == torch.float32


@torch.no_grad()
def test_vision_half_of_a_whole_clip(tmp_path):
    torch.manual_seed(2)
    vision = SIZES | {"image_size": 16, "patch_size": 4}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=SIZES | {"vocab_size": 40})).eval()
    clip.save_pretrained(tmp_path)
    tower = load_vision(tmp_path, layer=-2).eval()
    pixels = torch.randn(1, 3, 16, 16)
    expected = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert_close(tower(pixels)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("backbone.layers.1.mixer.D"), r"missing backbone\.layers\.1\.mixer\.ssm\.D \(48,\)"),
        (lambda t: t.update(extra=torch.zeros(3)), r"surplus extra \(3,\)"),
        (lambda t: t.update({"backbone.norm_f.weight": torch.zeros(7)}), r"norm_f\.weight is \(7,\), expected \(24,\)"),
    ],
)
def test_every_wrong_key_is_named(original, change, message):
    tensors = torch.load(original / "pytorch_model.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, original / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        load_language(original)


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/vlmamba-bomb-went-off", "w"))


def test_pickle_with_code_is_refused(original, tmp_path):
    torch.save({"backbone.norm_f.weight": Bomb()}, original / "pytorch_model.bin")
    with pytest.raises(ValueError, match="was refused"):
        load_language(original)
    (original / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="was refused"):
        load_language(original)


def test_folders_that_are_no_checkpoints(tmp_path, original):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_language(tmp_path / "original" / "..")
    with pytest.raises(ValueError, match="neither a folder here nor a Hub id"):
        load_language("no such thing")
    (original / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_language(original)
    (original / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
    with pytest.raises(ValueError, match="shards that are not there"):
        load_language(original)
    (original / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_language(original)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"d_model": 8, "n_layer": 1, "vocab_size": 8, "ssm_cfg": {"layer": "Mamba2"}}, "only Mamba-1"),
        ({"d_model": 8, "n_layer": 1, "vocab_size": 8, "rms_norm": False}, "rms_norm is false"),
        ({"d_model": 8, "n_layer": 1, "vocab_size": 8, "ssm_cfg": {"d_stat": 4}}, "d_stat"),
    ],
)
def test_other_architectures_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        language_config(raw, "here")


def test_padded_vocabulary():
    raw = {"d_model": 8, "n_layer": 1, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
    config, tokens = language_config(raw, "here")
    assert (config.vocab_size, tokens) == (50280, 50277)
    assert language_config({"model_type": "mamba", "vocab_size": 50280}, "here")[1] == 50277
