"""A tiny run: coloured squares in LLaVA's format, a model of a few thousand parameters, 16-pixel images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmamba.training.config import RunConfig, from_mapping

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "white": (255, 255, 255)}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder with data.json and images/: 12 samples, one of them without an image."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    entries: list[dict[str, Any]] = []
    for i in range(11):
        colour = list(COLOURS)[i % 4]
        Image.new("RGB", (20 + i, 16), COLOURS[colour]).save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": f"A {colour} square"}]
        turns += [{"from": "human", "value": "Is it big?"}, {"from": "gpt", "value": "no"}] * (i % 3)
        entries.append({"id": f"s{i}", "image": f"{i}.png", "conversations": turns})
    entries.append(
        {"id": "text", "conversations": [{"from": "human", "value": "Is this yes?"}, {"from": "gpt", "value": "yes"}]}
    )
    (folder / "data.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def tokenizer_folder(tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(dataset: Path, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A recipe for the tiny model; keyword arguments replace its sections' fields: `recipe(optim={"pack": True})`."""

    def make(**changes: Any) -> RunConfig:
        raw: dict[str, Any] = {
            "output": str(tmp_path / "run"),
            "model": {
                "tokenizer": str(tokenizer_folder),
                "vision": {
                    "image_size": 16,
                    "patch_size": 8,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                },
                "language": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
            },
            "data": [{"llava": {"file": str(dataset / "data.json"), "images": str(dataset / "images")}}],
            "stage": {"connector": {"lr": 1e-2}, "language": {"lr": 1e-2}},
            "optim": {"global_batch": 4, "micro_batch": 2, "max_steps": 6, "max_length": 256},
            "checkpoint": {"every": 2, "keep": 2},
            "logging": {"every": 1, "tensorboard": False},
            "workers": 0,
            "device": "cpu",
        }
        for section, value in changes.items():
            raw[section] = raw.get(section, {}) | value if isinstance(value, dict) else value
        return from_mapping(RunConfig, raw)

    return make
