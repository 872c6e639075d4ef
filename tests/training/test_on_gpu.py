"""A run on a CUDA device: bf16 compute over fp32 parameters, workers and pinned batches, stop and go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from ranks import Job, run_jobs
from test_trainer import after

from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import run
from vlmamba.training.metrics import read_metrics
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
    after(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    cut = recipe(output=str(tmp_path / "cut"), **CUDA)
    with pytest.raises(Interrupted):
        run(cut)
    run(cut)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_are_one(recipe, tmp_path) -> None:
    optim = {"micro_batch": 1, "global_batch": 4, "max_steps": 4, "bf16": False}
    wide = CUDA | {"optim": optim, "workers": 0}
    run(recipe(output=str(tmp_path / "one"), **wide))
    jobs = [Job(recipe(output=str(tmp_path / kind), parallel=kind, **wide)) for kind in ("ddp", "fsdp")]
    narrow = wide | {"optim": optim | {"bf16": True, "checkpoint_activations": True, "pack": True}}
    jobs += [Job(recipe(output=str(tmp_path / "bf16"), parallel="fsdp", **narrow))]
    jobs += [Job(recipe(output=str(tmp_path / "cut"), parallel="fsdp", **wide), stop_at=3)]
    run_jobs(jobs, tmp_path)
    for kind in ("ddp", "fsdp"):
        assert losses(tmp_path / kind) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert all(loss < 10 for loss in losses(tmp_path / "bf16"))
    run(recipe(output=str(tmp_path / "cut"), **wide))
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize("flag", ["compile", "checkpoint_activations"])
def test_flags_change_little(recipe, tmp_path, flag) -> None:
    optim = {"max_steps": 3, "bf16": False}
    run(recipe(output=str(tmp_path / "plain"), **CUDA, optim=optim))
    run(recipe(output=str(tmp_path / flag), **CUDA, optim=optim | {flag: True}))
    assert losses(tmp_path / flag) == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
