"""Recipes: typed, strict, with errors that help."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from vlmamba.training.config import ConfigError, find_recipe, from_mapping, load_config

RECIPE = """
output: out
model:
  language: {hidden_size: 16}
  tokenizer: somewhere
data:
  - scenes: {seed: 3, what: text}
    size: 10
stage:
  language: {lr: 1e-3}
optim: {global_batch: 8, micro_batch: 4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def test_values_and_overrides(recipe: Path) -> None:
    overrides = ["--optim.max_steps=3", "stage.language.lr=2e-4", "data.0.scenes.seed=4", "model.language.expand=3"]
    config = load_config(recipe, overrides, output="elsewhere")
    assert config.output == "elsewhere"
    assert config.optim.max_steps == 3
    assert config.stage.language.lr == 2e-4
    assert config.data[0].scenes is not None
    assert (config.data[0].scenes.seed, config.data[0].scenes.what) == (4, "text")
    assert config.model.language == {"hidden_size": 16, "expand": 3}
    assert (config.optim.global_batch, config.optim.max_length) == (8, 2048)


def test_round_trip(recipe: Path) -> None:
    config = load_config(recipe)
    assert from_mapping(type(config), asdict(config)) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optm.max_steps=3", "unknown key optm; did you mean optim?"),
        ("optim.max_step=3", "unknown key optim.max_step; did you mean optim.max_steps?"),
        ("data.0.scenes.sed=3", "unknown key data.0.scenes.sed; did you mean data.0.scenes.seed?"),
        ("stage.zzz=3", "unknown key stage.zzz; known ones: stage.connector, "),
        ("data.2.size=3", "'2' is no item of a list of 1"),
        ("optim.max_steps", "write it as key=value"),
        ("optim.max_steps=many", "optim.max_steps: Expected int Given value: many"),
        ("stage.template=v2", "stage.template: Expected one of 'plain', 'v1'"),
        ("optim.micro_batch=3", "3 does not divide optim.global_batch 8"),
        ("data.0.size=0", "data.0.size: scenes are endless"),
        ("data=[]", "data: is empty"),
        ("stage.language.lr=0", "nothing is trained"),
        ("model.path=there", "path names a whole model, with its own language, tokenizer; leave path or these out"),
        ("model.language=null", "name a path"),
        ("optim.warmup=1", "optim.warmup"),
        ("optim.grad_clip=-1", "optim.grad_clip: is -1.0; it must be 0 (no clipping) or more"),
        ("optim.grad_clip=.nan", "optim.grad_clip: is nan"),
        ("optim.time_budget=0", "optim.time_budget: is 0.0; it must be positive"),
        ("optim.epochs=.inf", "optim.epochs: is inf"),
        ("optim.beta1=1.5", "optim.beta1: is 1.5; it must be from 0 to below 1"),
        ("optim.eps=-1", "optim.eps: is -1.0"),
        ("optim.final_lr=-3", "optim.final_lr: is -3.0"),
        ("output.x=1", "output is a value"),
    ],
)
def test_mistakes_are_named(recipe: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override", ["connector=mlp", "scan=csm", "scan_weights=per-order", "vision_layer=-1", "image_place=after"]
)
def test_a_whole_model_is_not_put_together_anew(override: str) -> None:
    field = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"with its own {field}; leave path or these out"):
        load_config("finetune/cpu", [f"model.{override}"], output="out")


def test_mistakes_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    for text, words in (
        (RECIPE + "sed: 3", "r.yaml: unknown key sed; did you mean seed?"),
        (RECIPE.replace("output: out", ""), "output is missing"),
        ("a: [", "is not valid YAML"),
        ("- 1", "holds no mapping"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
            load_config(file)


def test_shipped_recipe_by_name() -> None:
    assert find_recipe("paper/stage1").name == "stage1.yaml"
    with pytest.raises(ConfigError, match="paper/stage1"):
        find_recipe("paper/stage9")


@pytest.mark.parametrize(("name", "folder"), [("nano/pipeline", "nano"), ("{}/pipeline.yaml", "{}")])
def test_a_pipeline_is_no_recipe(name: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text("stages: [one]")
    with pytest.raises(ConfigError, match=re.escape("name its folder: vlmamba train " + folder.format(tmp_path)) + "$"):
        load_config(name.format(tmp_path), output="out")


def test_reading_a_recipe_needs_no_torch(recipe: Path) -> None:
    code = (
        "import sys; from vlmamba.training import load_config; load_config(sys.argv[1]); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
