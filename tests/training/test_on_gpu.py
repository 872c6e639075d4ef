"""A run on a CUDA device: bf16 compute over fp32 parameters, workers and pinned batches, stop and go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import run
from vlmamba.training.metrics import read_metrics
from vlmamba.training.step import Step
from vlmamba.training.trainer import Interrupted

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = {"device": "cuda", "workers": 2, "model": {"language": {"hidden_size": 32, "num_hidden_layers": 2}}}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("pack", [False, True])
def test_it_learns_in_bf16_with_fp32_parameters(recipe, tmp_path, pack) -> None:
    optim = {"max_steps": 60, "pack": pack}
    folder = run(recipe(optim=optim, checkpoint={"every": 100}, **CUDA))
    numbers = losses(tmp_path / "run")
    assert numbers[-1] < 0.6 * numbers[0]
    assert {p.dtype for p in VLMambaForConditionalGeneration.from_pretrained(folder).parameters()} == {torch.float32}


def test_cpu_and_cuda_agree(recipe, tmp_path) -> None:
    for device in ("cpu", "cuda"):
        change = CUDA | {"device": device, "output": str(tmp_path / device)}
        run(recipe(optim={"max_steps": 3, "bf16": False}, **change))
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2)


def test_it_goes_on_where_it_stopped(recipe, tmp_path, monkeypatch) -> None:
    run(recipe(output=str(tmp_path / "whole"), **CUDA))
    original, calls = Step.__call__, []

    def call(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(Step, "__call__", call)
    cut = recipe(output=str(tmp_path / "cut"), **CUDA)
    with pytest.raises(Interrupted):
        run(cut)
    run(cut)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)
