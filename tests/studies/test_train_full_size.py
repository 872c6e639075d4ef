"""The study of full-size training steps, in miniature."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest


@pytest.mark.parametrize("stage", [1, 2])
def test_in_miniature(stage: int, tmp_path: Path, monkeypatch, capsys) -> None:
    script = Path(__file__).parents[2] / "studies" / "train_full_size.py"
    command = f"x --toy --device cpu --stage {stage} --resume --json {tmp_path / 'out.json'}"
    command += f" --profile {tmp_path / 'kernels.json'}"
    monkeypatch.setattr("sys.argv", command.split())
    runpy.run_path(str(script), run_name="__main__")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["resume"]["same_loss"]
    assert found["tokens_per_second"] > 0
    assert 0 <= found["data_wait"] < 1
    assert 0 < found["share_of_product_rate"] < 1
    assert found["images_per_second"] > 0
    profile = json.loads((tmp_path / "kernels.json").read_text())
    times = [kernel["ms"] for kernel in profile["kernels"]]
    assert times == sorted(times, reverse=True)
    assert 1 < len(times) <= 40
    assert 0 < sum(times) <= profile["all_ms"] <= 1.01 * profile["step_ms"]
    assert any("selective_scan" in kernel["name"] for kernel in profile["kernels"])
