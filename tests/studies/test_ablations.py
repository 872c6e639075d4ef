"""The ablation study: its recipes, its arithmetic, its refusals, and a rehearsal on the CPU."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, SiglipVisionConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from studies.ablations.__main__ import main, tasks
from studies.ablations.drawn import draw, feed_from
from studies.ablations.plan import (
    BY_NAME,
    MATCHED,
    TOY,
    VARIANTS,
    Claim,
    Study,
    align_recipe,
    drawn_recipe,
    instruct_recipe,
)
from studies.ablations.report import Findings, _claims, close, group, write
from studies.ablations.schedule import Task, do_all, is_free, lock
from studies.ablations.work import execute, finished, results
from vlmamba.models.config import VLMambaConfig
from vlmamba.models.connector import Connector
from vlmamba.models.processor import VLMambaProcessor
from vlmamba.training.build import build
from vlmamba.training.launch import make_feed
from vlmamba.training.parallel import World


def test_runs_read_as_many_samples_in_the_same_order() -> None:
    study = Study(Path("runs/study"))
    base = instruct_recipe(study, BY_NAME["baseline"], 2)
    for variant in VARIANTS:
        recipe = instruct_recipe(study, variant, 2)
        reference = instruct_recipe(study, BY_NAME[variant.reference], 2)
        assert recipe.optim.max_steps == variant.share * variant.epochs * (base.optim.max_steps or 0)
        assert recipe.optim.time_budget is None
        assert recipe.seed == base.seed
        if variant.data == BY_NAME[variant.reference].data:
            assert (recipe.data, recipe.optim) == (reference.data, reference.optim), variant.name
        assert (recipe.model.path is not None) == variant.align
        align = align_recipe(study, variant, 2)
        assert align.data == align_recipe(study, BY_NAME["baseline"], 2).data
    assert base.data != instruct_recipe(study, BY_NAME["baseline"], 1).data
    half = instruct_recipe(study, BY_NAME["half-twice"], 2).data
    assert sum(source.size for source in half) == 64 * (base.optim.max_steps or 0) // 2
    assert [source.scenes.again for source in half if source.scenes] == [True, True]


def test_connectors_have_as_many_parameters() -> None:
    vision = SiglipVisionConfig(hidden_size=256, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = MambaConfig(hidden_size=256, num_hidden_layers=1, vocab_size=32)
    sizes = {}
    for name in ("mlp", "vss-mlp", "vss-l2"):
        width = MATCHED if name == "mlp" else None
        with torch.device("meta"):
            made = Connector(
                VLMambaConfig(vision_config=vision, text_config=text, connector=name, connector_width=width)
            )
        sizes[name] = sum(p.numel() for p in made.parameters())
    assert sizes["vss-mlp"] == sizes["vss-l2"]
    assert sizes["mlp"] == pytest.approx(sizes["vss-l2"], rel=2e-3)


def test_every_task_stands_after_what_it_needs() -> None:
    seen: set[str] = set()
    for task in tasks(VARIANTS, 3):
        assert set(task.needs) <= seen
        seen.add(task.name)
    data = {task for task in seen if task.startswith("draw-")}
    assert len(seen - data) == 1 + 6 + 3 * len(VARIANTS)
    assert len(data) == 3 + 3 * 5  # of stage 0; of each seed: stage 1, stage 2, and three variants' own
    runs = [name for name in (task.name for task in tasks(VARIANTS, 2)) if name[-1] in "01" and "draw" not in name]
    assert [runs.index(name) for name in ("baseline-0", "siglip-0", "baseline-1", "after-0")] == [0, 11, 12, 24]


def result(variant: str, seed: int, skills: float, data: str = "d") -> dict[str, Any]:
    accuracy = {"accuracy": skills, "error": 1.0, "questions": 10}
    return {
        "variant": variant,
        "seed": seed,
        "scale": asdict(TOY),
        "recipe": "r",
        "data": data,
        "stage0": {"patches": "a", "language": "b"},
        "given": ["patches"],
        "versions": {"device": "cpu"},
        "train_seconds": 1.0,
        "measure_seconds": 1.0,
        "connector_parameters": 10,
        "parameters": 20,
        "benchmarks": {"gqa": {"score": skills / 2, "error": 1.0}, "mmvet": {"score": None, "error": None}},
        "skills": {"all": accuracy},
        "controls": dict.fromkeys(("picture", "shuffled", "none"), accuracy),
        "probe": {"rows": {"3": accuracy}, "row": {"1": accuracy}},
    }


ROWS = [
    *(result("baseline", seed, value) for seed, value in enumerate((50.0, 52.0, 54.0))),
    *(result("mlp", seed, value) for seed, value in enumerate((46.0, 47.0, 48.0))),
    *(result("csm", seed, value) for seed, value in enumerate((51.0, 54.0, 54.0))),
]


def test_differences_are_paired_and_their_spread_is_pooled() -> None:
    found, skills = Findings(ROWS), group("skills", "all")
    assert found.differences("mlp", skills) == [-4.0, -5.0, -6.0]
    spread = math.sqrt((2.0 + 2.0) / 4)  # two variants, squares of 2 each about their means, two degrees each
    assert found.spread(skills) == pytest.approx(spread)
    assert found.difference("mlp", skills) == pytest.approx((-5.0, spread / math.sqrt(3)))
    assert found.difference("baseline", skills) is None
    assert close(ROWS, 2.0) == ["csm"]
    encoders = [result(name, seed, 40.0 + seed + (name == "clip")) for name in ("clip", "siglip") for seed in range(3)]
    assert close(ROWS + encoders, 2.0) == ["csm", "clip", "siglip"]  # far from the baseline, near each other


def test_report(tmp_path: Path) -> None:
    page = write(ROWS, tmp_path).read_text()
    assert "| 52.0 ± 1.2 |" in page
    assert "**-5.0 ± 0.6**" in page  # skills
    assert "+1.0 ± 0.6 |" in page
    assert "mean of 8" in page
    assert "POPE 0" not in page
    assert "was given: patches." in page
    assert "Not run: vss-mlp, mlp-narrow, forward" in page
    assert "| baseline - mlp, TextVQA, MME, MMBench, MM-Vet |  |" in page
    for axis in ("connector", "scan"):
        assert f"(study-{axis}.svg)" in page
        assert (tmp_path / f"study-{axis}.svg").read_text().count("<circle") == 3
    assert not (tmp_path / "study-encoder.svg").exists()


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ("baseline", "mlp", "agrees"),
        ("mlp", "baseline", "disagrees: the other is better"),
        ("csm", "baseline", "cannot be told: only a difference above 0.8 points would have shown"),
        ("baseline", "siglip", "cannot be told: fewer than two seeds"),
    ],
)
def test_what_the_numbers_say_of_the_papers_words(better: str, worse: str, verdict: str) -> None:
    line = next(_claims(Findings(ROWS), [Claim("words", better, worse, ("gqa",))]))
    assert line.endswith(f"| {verdict} |")
    line = next(_claims(Findings(ROWS), [Claim("words", better, worse, ("gqa",), equal=True)]))
    assert ("| agrees: a difference above 0.8" in line) is (better == "csm")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (result("mlp", 0, 1.0, data="other"), "saw other samples than baseline"),
        (result("mlp", 0, 1.0) | {"recipe": "another"}, "its recipe is not that of baseline-0"),
        (result("mlp", 0, 1.0) | {"stage0": {"patches": "c"}}, "stands on another patches"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    study = Study(tmp_path, TOY)
    (tmp_path / "results").mkdir()
    for one in (ROWS[0], row):
        study.result(one["variant"], 0).write_text(json.dumps(one))
    with pytest.raises(ValueError, match=told):
        results(study)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two runs, in this process."""
    study = Study(tmp_path_factory.mktemp("study"), TOY, workers=0, device="cpu")
    runs = ("draw-align-0", "draw-instruct-0", "draw-instruct-after-0", "baseline-0", "after-0")
    parts = ("draw-pairs", "clip", "draw-patches", "patches", "draw-text", "language")
    for task in ("prepare", *parts, *runs):
        assert not finished(study, task)
        execute(study, task)
        assert finished(study, task)
    return study


def test_a_run_reads_what_the_loader_would_have_given(rehearsed: Study) -> None:
    """And what is missing of it is drawn again, alike."""
    recipe = drawn_recipe(rehearsed, "draw-align-0")
    processor = VLMambaProcessor.from_pretrained("src/vlmamba/assets/nano")
    recipe = replace(recipe, optim=replace(recipe.optim, max_steps=3))
    folder = rehearsed.output / "three"
    draw(recipe, folder, 0)
    first = (folder / "000000.safetensors").stat().st_mtime_ns
    (folder / "000001.safetensors").unlink()
    draw(recipe, folder, 2)
    assert (folder / "000000.safetensors").stat().st_mtime_ns == first
    cpu = torch.device("cpu")
    drawn = feed_from(folder)(recipe, processor, cpu, World())
    assert len(drawn.data.sources) == len(recipe.data)
    loaded = make_feed(recipe, build(recipe.model, "pad")[1], cpu)
    for (mine,), (theirs,) in islice(zip(drawn.batches(1), loaded.batches(1), strict=True), 2):
        assert mine.ids == theirs.ids
        for name in ("input_ids", "labels", "seq_idx", "pixels"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    with pytest.raises(ValueError, match="holds 3 steps, the recipe has 4"):
        feed_from(folder)(replace(recipe, optim=replace(recipe.optim, max_steps=4)), processor, cpu, World())


def test_a_task_is_one_process_s(tmp_path: Path) -> None:
    def hold(ready: Any, stop: Any) -> None:
        assert lock(tmp_path, "clip") is not None
        ready.set()
        stop.wait(20)

    fork = multiprocessing.get_context("fork")
    ready, stop = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(ready, stop))
    other.start()
    assert ready.wait(20)
    assert not is_free(tmp_path, "clip")
    assert lock(tmp_path, "clip") is None
    other.kill()
    other.join()
    assert is_free(tmp_path, "clip")
    assert lock(tmp_path, "clip") is not None


def test_a_run_leaves_one_small_file(rehearsed: Study) -> None:
    base, after = results(rehearsed)[::-1]
    assert (base["variant"], after["variant"]) == ("baseline", "after")
    assert base["data"] == after["data"]
    assert set(base["benchmarks"]) >= {"vqav2", "gqa", "scienceqa", "textvqa", "mme", "mmbench", "mmvet"}
    assert all(value["score"] is not None for value in base["benchmarks"].values())
    assert set(base["controls"]) == {"picture", "shuffled", "none"}
    assert sum(group["questions"] for group in base["probe"]["row"].values()) == TOY.probe
    assert list(base["losses"]) == ["1-align", "2-instruct"]
    assert not any((rehearsed.output / "work").iterdir())
    assert rehearsed.result("after", 0).stat().st_size < 20_000


def test_what_is_left_undone_is_told(rehearsed: Study, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that needs what is not there, and a sitting that is over before it begins."""

    def done(task: str) -> bool:
        return finished(rehearsed, task)

    given = [Task("csm-0", ("prepare",)), Task("siglip-0", ("siglip",))]
    assert do_all(rehearsed, given, done, [None], deadline=time.monotonic() - 1) == []
    assert "for another sitting: csm-0, siglip-0" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything, in fresh processes; a second call has nothing left to do."""
    arguments = ["--toy", "--seeds", "2", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert "[52/52]" in capsys.readouterr().out
    page = tmp_path / "study-results.md"
    assert "The numbers mean nothing" in page.read_text()
    first = page.read_text()
    page.unlink()
    assert main(arguments) == 0
    assert "done" not in capsys.readouterr().out
    assert page.read_text() == first


def test_unknown_axes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "connecter"])
    assert "connecter unknown; the axes are connector, scan" in capsys.readouterr().err
