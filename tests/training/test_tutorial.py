"""docs/finetune.md is run as written: its data are made fewer and its training shorter."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from vlmamba.cli import main
from vlmamba.training.build import NANO

TUTORIAL = Path(__file__).parents[2] / "docs" / "finetune.md"
SMALLER = [("TRAIN, TEST = 600, 100", "TRAIN, TEST = 8, 4")]
SHORTER = ["optim.max_steps=2", "workers=0", "optim.global_batch=4", "optim.micro_batch=4"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL.read_text(), flags=re.S)


def test_as_written(tiny_model, tmp_path, monkeypatch, capsys) -> None:
    import vlmamba

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlmamba, "nano", lambda: str(tiny_model))
    torch.set_num_threads(1)
    (data,) = blocks("python")
    for whole, part in SMALLER:
        assert whole in data
        data = data.replace(whole, part)
    exec(compile(data, str(TUTORIAL), "exec"), {})
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert {words[1] for words in commands} == {"data", "eval", "train", "ask"}
    said = ""
    for words in commands:
        assert words[0] == "vlmamba"
        words = [str(tiny_model) if word == NANO else word for word in words[1:]]
        overfits = "--overfit-one-batch" in words
        code = main([*words[:2], *(SHORTER if words[0] == "train" else []), *words[2:]])
        assert code == 0 or (overfits and code == 1), words  # the tiny model need not learn it in so few steps
        said += capsys.readouterr().out
    assert "at the peak" in said
    for name in re.findall(r"^    runs/gauge/(\S+)", TUTORIAL.read_text(), flags=re.M):
        if name != "skipped.jsonl":  # nothing was
            assert (tmp_path / "runs/gauge" / name).exists(), name
    for folder in ("before", "after"):
        assert list((tmp_path / "runs" / folder).rglob("*.json"))


def test_files_named_are_there() -> None:
    for name in re.findall(r"docs/(\w+\.md)", TUTORIAL.read_text()):
        assert (TUTORIAL.parent / name).is_file()


@pytest.mark.parametrize("recipe", re.findall(r"`(finetune/\w+|paper(?:/[\w.-]+)?)`", TUTORIAL.read_text()))
def test_recipes_named_are_there(recipe: str) -> None:
    from vlmamba.training.config import find_recipe

    assert find_recipe(recipe).is_file()
