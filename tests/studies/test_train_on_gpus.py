"""The table of training on GPUs, in miniature: rows that work, rows that fail, equality of one process and another."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    import train_on_gpus

    yield train_on_gpus
    for name in ("train_on_gpus", "train_full_size", "train_equality"):
        sys.modules.pop(name, None)


def test_a_row_that_fails_leaves_the_others(study, tmp_path, monkeypatch, capsys) -> None:
    rows = [
        study.Row("stage 2", 1, "--stage 2 --resume --recompute 0.5"),
        study.Row("broken", 1, "--pack-into many"),
        study.Row("equality", 2, "", script="train_equality.py"),
    ]
    monkeypatch.setattr(study, "ROWS", rows)
    monkeypatch.setattr("sys.argv", ["x", "--toy", "--out", str(tmp_path)])
    study.main()
    capsys.readouterr()
    found = {row["row"]: row for row in json.loads((tmp_path / "training-cpu.json").read_text())}
    assert found["stage 2"]["resume"]["same_loss"]
    assert 0 < found["stage 2"]["share_of_product_rate"] < 1
    assert len(found["stage 2"]["step_ms"]) == 2
    assert "invalid int value: 'many'" in found["broken"]["problem"]
    differences = found["equality"]["differences"]
    assert len(differences) == 4  # loss and norm, DDP and FSDP2
    assert max(differences.values()) < 1e-5
    table = (tmp_path / "training-cpu.md").read_text()
    assert table.count("| stage 2 |") == 1
    assert "made again: the same loss" in table
    assert "broken: did not finish" in table


def test_rows_are_what_there_is(study) -> None:
    assert len({row.name for row in study.ROWS}) == len(study.ROWS)
    assert all((STUDIES / row.script).is_file() for row in study.ROWS)


def test_arithmetic_counts_what_learns(study) -> None:
    import torch
    from train_full_size import arithmetic

    model = torch.nn.ModuleDict(
        {
            "vision_tower": torch.nn.Linear(2, 2, bias=False),
            "connector": torch.nn.Linear(3, 1, bias=False),
            "language_model": torch.nn.Linear(5, 1, bias=False),
        }
    )
    model["vision_tower"].requires_grad_(False)
    assert arithmetic(model) == (6 * 5, 2 * 4 + 6 * 3)
    model["language_model"].requires_grad_(False)
    assert arithmetic(model) == (4 * 5, 2 * 4 + 6 * 3)
