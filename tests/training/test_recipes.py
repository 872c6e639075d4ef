"""Every shipped recipe is valid."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch

from vlmamba.models.processor import VLMambaProcessor
from vlmamba.training.config import PIPELINE_FILE, ConfigError, load_config, recipes_folder
from vlmamba.training.estimate import estimate
from vlmamba.training.launch import make_feed
from vlmamba.training.plan import dry_run
from vlmamba.training.stages import plan_pipeline, read_pipeline, stage_config

FOLDERS = sorted(p.parent for p in recipes_folder().rglob(PIPELINE_FILE))
RUNS = sorted(p for p in recipes_folder().rglob("*.yaml") if p.parent not in FOLDERS)


@cache
def planned(folder: Path) -> str:
    """The whole plan; where the recipes' data are not there, as of the paper's here, the error comes after it."""
    lines = []
    with nullcontext() if folder.name == "nano" else pytest.raises(ValueError, match=r"llava_v1|blip_laion"):
        for line in plan_pipeline(folder, Path("out")):
            lines.append(line)
    return "\n".join(lines)


@pytest.mark.parametrize("file", RUNS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_run(file: Path) -> None:
    load_config(file, output="out")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_pipeline(folder: Path, tmp_path: Path) -> None:
    pipeline = read_pipeline(folder)
    for stage in pipeline.stages:
        assert stage_config(folder, pipeline, stage, tmp_path).output == str(tmp_path / stage)
    assert {p.stem for p in (folder / pipeline.recipes).glob("*.yaml")} == {"pipeline", *pipeline.stages}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_pipeline_in_a_dry_run(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Sizes fit together through all stages, and nothing is fetched, loaded or written."""
    monkeypatch.chdir(tmp_path)
    text = planned(folder)
    stages = read_pipeline(folder).stages
    assert text.count("memory: about") == 2 * len(stages)
    assert text.count("# stage ") == len(stages)
    assert not list(tmp_path.iterdir())


def test_rows_of_the_ablations() -> None:
    sizes = {}
    for folder in (f for f in FOLDERS if f.parent.name == "paper" or f.name == "paper"):
        text = planned(folder)
        sizes[folder.name] = tuple(re.findall(r"(vision|connector|language): ([\d.]+)M parameters, frozen", text))[:2]
        assert "connector: " in text
        assert "learning rate 0.001" in text
        assert text.count("learning rate 2e-05") == 2
    assert len(sizes) == 8
    assert dict(sizes["paper"]) == {"vision": "397.75", "language": "2768.35"}
    assert dict(sizes["language-1.4b"])["language"] == "1372.18"
    assert dict(sizes["encoder-clip"])["vision"] == "290.91"


@pytest.mark.parametrize("name", ["full", "lora", "cpu"])
def test_finetuning_in_a_dry_run(name: str, tiny_model: Path) -> None:
    config = load_config(f"finetune/{name}", [f"model.path={tiny_model}"], output="out")
    text = "\n".join(dry_run(config))
    assert "vision: 0.0" in text
    assert "frozen" in text
    assert (" of them" in text) == (name == "lora")


def test_a_dry_run_and_the_run_count_the_same(tiny_model: Path, dataset: Path) -> None:
    data = [f"data.0.llava.file={dataset}/data.json", f"data.0.llava.images={dataset}/images", "workers=0"]
    config = load_config("finetune/cpu", [f"model.path={tiny_model}", *data], output="out")
    feed = make_feed(config, VLMambaProcessor.from_pretrained(tiny_model), torch.device("cpu"))
    assert sum(len(batch.ids) for batch in next(feed.batches())) == config.optim.global_batch
    assert feed.order.steps(config.optim.epochs) == estimate(config, "cpu").steps
    packed = load_config("finetune/lora", [f"model.path={tiny_model}", *data], output="out")
    assert "in whole rows a step holds about 64 samples" in "\n".join(dry_run(packed))
    assert "in whole rows" not in "\n".join(dry_run(config))


def test_the_papers_numbers() -> None:
    one, two = (load_config(f"paper/stage{n}", output="out") for n in (1, 2))
    assert (one.model.connector, one.model.scan, one.model.vision_layer) == ("vss-l2", "bsm", -2)
    assert (one.model.vision, one.model.language) == (
        "google/siglip-so400m-patch14-384",
        "state-spaces/mamba-2.8b-slimpj",
    )
    assert (one.stage.template, one.stage.image_mode, two.stage.template, two.stage.image_mode) == (
        "plain",
        "crop",
        "v1",
        "pad",
    )
    rates = [(c.stage.vision.lr, c.stage.connector.lr, c.stage.language.lr) for c in (one, two)]
    assert rates == [(0, 1e-3, 0), (0, 2e-5, 2e-5)]
    assert (one.optim.global_batch, two.optim.global_batch) == (256, 128)
    for config in (one, two):
        assert (config.optim.epochs, config.optim.warmup, config.optim.max_length) == (1, 0.03, 2048)
        assert all(getattr(config.stage, p).weight_decay == 0 for p in ("vision", "connector", "language"))


def test_overrides_of_the_model(tmp_path: Path) -> None:
    """One for all stages reaches those that make the model, not one that goes on with it; order decides."""
    folder = recipes_folder() / "nano"
    pipeline = read_pipeline(folder)

    def scan(stage: str, *overrides: str) -> str | None:
        return stage_config(folder, pipeline, stage, tmp_path, overrides).model.scan

    assert scan("1-align", "model.scan=csm") == scan("0a-vision", "--model.scan=csm") == "csm"
    assert scan("2-instruct", "model.scan=csm") == "bsm"
    assert scan("1-align", "model.scan=csm", "1-align.model.scan=forward", "2-instruct.optim.max_steps=1") == "forward"
    assert scan("1-align", "1-align.model.scan=forward", "model.scan=csm") == "csm"
    with pytest.raises(ConfigError, match="scan"):
        scan("2-instruct", "2-instruct.model.scan=csm")
    with pytest.raises(ConfigError, match="scan"):  # a folder's model is as it is
        scan("2-instruct", "2-instruct.model.path=elsewhere", "model.scan=csm")


def test_nano_budget(tmp_path: Path) -> None:
    folder = recipes_folder() / "nano"
    pipeline = read_pipeline(folder)
    runs = [stage_config(folder, pipeline, stage, tmp_path) for stage in pipeline.stages]
    assert sum(run.optim.time_budget or 0 for run in runs) <= 20
    assert pipeline.export_size_limit <= 20
