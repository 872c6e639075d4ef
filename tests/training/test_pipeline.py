"""Stages one after another: the nano pipeline in miniature, from nothing to a model that answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import vlmamba
from vlmamba.models.weights import load_vision
from vlmamba.training.config import ConfigError, recipes_folder
from vlmamba.training.curve import draw_curves
from vlmamba.training.stages import run_pipeline
from vlmamba.training.tokenizer import train_tokenizer

TINY = [
    "tokenizer.samples=50",
    "optim.global_batch=2",
    "optim.micro_batch=2",
    "optim.max_steps=2",
    "optim.time_budget=null",
    "workers=0",
    "device=cpu",
    "logging.every=1",
    "logging.tensorboard=false",
    "0a-vision.model.vision.num_hidden_layers=1",
    "0a-vision.model.vision.hidden_size=32",
    "0a-vision.model.vision.intermediate_size=32",
    "0a-vision.model.vision.patch_size=32",
    "0b-language.model.language.hidden_size=32",
    "0b-language.model.language.num_hidden_layers=1",
]


def test_nano_in_miniature(tmp_path: Path, capsys) -> None:
    folder = run_pipeline("nano", tmp_path / "out", [*TINY, "model.scan=csm"])
    model = vlmamba.VLMambaForConditionalGeneration.from_pretrained(folder)
    processor = vlmamba.VLMambaProcessor.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert next(p for n, p in model.named_parameters() if n.endswith("A_log")).dtype == torch.float32
    assert processor.image_size == (128, 128)
    card = (folder / "README.md").read_text()
    assert "import vlmamba" in card
    assert model.config.scan == "csm"
    assert "scan csm (shared weights)" in card
    assert "bsm" not in card
    assert (tmp_path / "out/curves.svg").is_file()
    # Frozen parts travel through the stages unchanged; alignment leaves the language model alone.
    encoder = load_vision(tmp_path / "out/0a-vision/model", layer=-1).state_dict()
    stages = [
        vlmamba.VLMambaForConditionalGeneration.from_pretrained(tmp_path / "out" / s / "model").state_dict()
        for s in ("1-align", "2-instruct")
    ]
    language = vlmamba.VLMambaForCausalLM.from_pretrained(tmp_path / "out/0b-language/model").state_dict()
    for name, tensor in encoder.items():
        assert torch.equal(tensor, stages[0][f"vision_tower.{name}"])
        assert torch.equal(tensor, stages[1][f"vision_tower.{name}"])
    aligned = {n.removeprefix("language_model."): t for n, t in stages[0].items() if n.startswith("language_model.")}
    assert aligned.keys() == language.keys()
    assert all(torch.equal(aligned[name], language[name]) for name in language)
    assert not all(torch.equal(stages[0][n], stages[1][n]) for n in stages[0] if n.startswith("language_model."))
    # A second call finds all stages finished; with one result gone, that stage alone is done again.
    capsys.readouterr()
    shutil.rmtree(tmp_path / "out/2-instruct")
    run_pipeline("nano", tmp_path / "out", [*TINY, "model.scan=csm"])
    assert capsys.readouterr().out.count("finished already") == 3


def test_overrides_are_checked_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key optim\.max_step"):
        run_pipeline("nano", tmp_path / "out", ["2-instruct.optim.max_step=3"])
    assert not (tmp_path / "out").exists()


def test_what_the_last_stage_lacks_is_said_before_the_first_begins(tmp_path: Path) -> None:
    lacking = ["2-instruct.data=[{llava: {file: nowhere.json, images: nowhere}}]"]
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        run_pipeline("nano", tmp_path / "out", [*TINY, *lacking])
    assert not list((tmp_path / "out").glob("*/config.yaml"))


def test_unknown_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shipped pipelines: nano"):
        run_pipeline("micro", tmp_path / "out")


def test_a_stage_that_is_not_there(tmp_path: Path) -> None:
    shutil.copytree(recipes_folder() / "nano", tmp_path / "recipes")
    file = tmp_path / "recipes/pipeline.yaml"
    file.write_text("stages: [2-instruct]\n")
    with pytest.raises(ConfigError, match="stage:1-align is not there yet"):
        run_pipeline(tmp_path / "recipes", tmp_path / "out")


def test_size_limit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="export_size_limit"):
        run_pipeline("nano", tmp_path / "out", [*TINY, "export_size_limit=0.01"])
    assert not (tmp_path / "out/model").exists()


TEXTS = ["what is the red thing? it is 34", "the red thing is a dog"] * 20 + ["zebu"]


def test_tokenizer_spells_what_is_rare(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 400, 0.1).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize(" the red zebu 34") == ["Ġthe", "Ġred", "Ġ", "z", "e", "b", "u", "Ġ", "3", "4"]
    assert (tokenizer.convert_ids_to_tokens(0), tokenizer.eos_token, tokenizer.pad_token) == (
        "<|endoftext|>",
        "<|endoftext|>",
        "<|padding|>",
    )
    assert tokenizer.convert_tokens_to_ids("<image>") == len(tokenizer) - 1


@pytest.mark.parametrize("text", ["Héllo wörld\n\t 日本 🙂", "", "  two  blanks ", "<image> 12.50€"])
def test_tokenizer_round_trip(text: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 400, 0.1)
    assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


def test_tokenizer_size() -> None:
    assert len(train_tokenizer(TEXTS, 263, 0.0)) == 263
    with pytest.raises(ValueError, match="at least 259"):
        train_tokenizer(TEXTS, 100, 0.1)
    with pytest.raises(ValueError, match="at least 261"):
        train_tokenizer(TEXTS, 260, 0.1, ["fire engines"])


def test_tokenizer_takes_given_words() -> None:
    tokenizer = train_tokenizer(TEXTS, 270, 0.1, ["zebus", "red zebus"])
    assert tokenizer.tokenize("the red zebus, zebu") == ["the", "Ġred", "Ġzebus", ",", "Ġ", "z", "e", "b", "u"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_curves(tmp_path: Path) -> None:
    lines = [{"step": s, "loss": 10 / s} for s in range(1, 50)]
    draw_curves({"a < b": lines, "one": lines[:1], "none": []}, tmp_path / "c.svg")
    svg = (tmp_path / "c.svg").read_text()
    assert svg.count("<polyline") == 2
    assert "a &lt; b: 0.204 at step 49" in svg
    assert "nan" not in svg


def test_public_names_are_functions() -> None:
    """Also once the modules that hold them are loaded."""
    import vlmamba.training

    for name in ("run", "run_pipeline", "load_config"):
        assert callable(getattr(vlmamba.training, name))
