"""Killed at any moment, a run goes on as if nothing had happened: packed mixture, accumulation, four loader workers."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Job, start

from vlmamba.training import run
from vlmamba.training.checkpoint import find_latest
from vlmamba.training.metrics import read_metrics

STEPS = 28
"""More than twenty after the first death."""


@pytest.fixture
def mixture(recipe, dataset) -> Any:
    """A packed mixture of two sources, two micro-batches a step, a checkpoint every second step."""

    def make(folder: Path) -> Any:
        llava = {"llava": {"file": str(dataset / "data.json"), "images": str(dataset / "images")}}
        return recipe(
            output=str(folder),
            data=[llava | {"weight": 2.0}, {"scenes": {"seed": 1, "what": "text"}, "size": 20}],
            optim={"pack": True, "max_steps": STEPS, "max_length": 512},
            checkpoint={"every": 2, "keep": 2},
            workers=4,
        )

    return make


def start_alone(config: Any, slow_save: float = 0.0) -> Any:
    return start([Job(config, slow_save=slow_save)], Path(config.output).parent)[0]


def until(condition: Any, process: Any, log: Path, timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.002)


def kill(process: Any) -> None:
    process.kill()
    process.wait()


def outcome(folder: Path) -> tuple[list[Any], dict[str, str]]:
    """Losses and gradient norms, and hashes of the last checkpoint: weights, moments, generators."""
    numbers = [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(folder / "metrics.jsonl")]
    manifest = json.loads((folder / f"checkpoints/step-{STEPS:06d}/manifest.json").read_text())
    del manifest["state.json"], manifest[".metadata"]  # which hold times
    return numbers, manifest


def ids(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "ids.jsonl").read_text().splitlines()]


def line_count(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def finish(config: Any) -> None:
    process = start_alone(config)
    try:
        assert process.wait(120) == 0, (Path(config.output).parent / "rank-0.log").read_text()[-3000:]
    finally:
        kill(process)


def test_killed_while_a_checkpoint_is_written(mixture, tmp_path) -> None:
    whole, cut = mixture(tmp_path / "whole"), mixture(tmp_path / "cut")
    run(whole)
    process = start_alone(cut, slow_save=0.3)
    folder = tmp_path / "cut/checkpoints"
    try:
        until(lambda: (folder / ".writing-step-000006").is_dir(), process, tmp_path / "rank-0.log")
    finally:
        kill(process)
    assert find_latest(folder) == folder / "step-000004"
    assert not (folder / "step-000006").exists()
    assert len(ids(tmp_path / "cut")) >= 6
    run(cut)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert not list(folder.glob(".writing*"))


def test_killed_between_two_micro_batches(mixture, tmp_path) -> None:
    """Of step 7: half of its gradients are there, and go with the process."""
    whole, cut = mixture(tmp_path / "whole"), mixture(tmp_path / "cut")
    run(whole)
    process = start([Job(cut, die_in=13)], tmp_path)[0]
    try:
        assert process.wait(90) == -signal.SIGKILL, (tmp_path / "rank-0.log").read_text()[-3000:]
    finally:
        kill(process)
    assert len(ids(tmp_path / "cut")) == 6
    run(cut)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_random_again_and_again(mixture, tmp_path) -> None:
    whole, cut = mixture(tmp_path / "whole"), mixture(tmp_path / "cut")
    finish(whole)
    chance = random.Random(5)
    for _ in range(4):
        process = start_alone(cut, slow_save=0.1)
        before = line_count(tmp_path / "cut")
        try:
            until(lambda at=before: line_count(tmp_path / "cut") not in (0, at), process, tmp_path / "rank-0.log")
            time.sleep(chance.uniform(0, 0.6))
        finally:
            kill(process)
    finish(cut)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    # Steps were made again, with the same samples, and none was left out.
    steps, made = ids(tmp_path / "whole"), ids(tmp_path / "cut")
    assert len(made) > len(steps) == STEPS
    assert all(one in steps for one in made)
    assert made[-1] == steps[-1]
