"""Every shipped recipe is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmamba.training.config import load_config, recipes_folder
from vlmamba.training.stages import PIPELINE_FILE, read_pipeline, stage_config

FOLDERS = sorted(p.parent for p in recipes_folder().rglob(PIPELINE_FILE))
RUNS = sorted(p for p in recipes_folder().rglob("*.yaml") if p.parent not in FOLDERS)


@pytest.mark.parametrize("file", RUNS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_run(file: Path) -> None:
    load_config(file)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_pipeline(folder: Path, tmp_path: Path) -> None:
    pipeline = read_pipeline(folder)
    for stage in pipeline.stages:
        assert stage_config(folder, pipeline, stage, tmp_path).output == str(tmp_path / stage)
    assert {p.stem for p in folder.glob("*.yaml")} == {"pipeline", *pipeline.stages}


def test_the_papers_numbers() -> None:
    one, two = load_config("paper/stage1"), load_config("paper/stage2")
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


def test_nano_budget(tmp_path: Path) -> None:
    folder = recipes_folder() / "nano"
    pipeline = read_pipeline(folder)
    runs = [stage_config(folder, pipeline, stage, tmp_path) for stage in pipeline.stages]
    assert sum(run.optim.time_budget or 0 for run in runs) <= 18
    assert pipeline.export_size_limit <= 20
