"""The scene benchmarks through the official readers: perfect answers score everything, wrong ones less."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from official import put_json
from rich.console import Console

from vlmamba.data.scenes.export import write
from vlmamba.data.scenes.sprites import available_things
from vlmamba.evaluation import Request, check, evaluate, score
from vlmamba.evaluation.report import report
from vlmamba.evaluation.results import table
from vlmamba.evaluation.task import Example
from vlmamba.evaluation.tasks import TASKS

BEST = {"mme": 2000.0}


class Oracle:
    """Knows the right answers, and gives every third of them wrong when told to."""

    def __init__(self, examples: Sequence[Example], wrong: bool) -> None:
        self.truth = {e.id: e.target.split(", unanswerable")[0] for e in examples}
        self.truth = {k: v.removeprefix("unanswerable, ") for k, v in self.truth.items()}
        self.order = {e.id: i for i, e in enumerate(examples)}
        self.wrong = wrong

    def describe(self) -> dict[str, Any]:
        return {"model": "oracle", "weights": str(self.wrong), "decoding": "greedy"}

    def answer(self, requests: Sequence[Request]) -> list[str]:
        return [self._one(request.id) for request in requests]

    def _one(self, qid: str) -> str:
        truth = self.truth[qid]
        if not self.wrong or self.order[qid] % 3:
            return truth
        return {"yes": "no", "no": "yes", "Yes": "No", "No": "Yes", "A": "B"}.get(truth, "A")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    for name in TASKS:
        if name == "pope" and not available_things():
            continue
        kind = "mm-vet" if name == "mmvet" else name
        write(root / kind, kind, 28 if name == "mme" else 8, seed=3, size=64, progress=False)
    return root


@pytest.mark.parametrize("name", list(TASKS))
def test_round_trip(name: str, sets: Path, tmp_path: Path) -> None:
    if name == "pope" and not available_things():
        pytest.skip("no emoji font: a POPE set needs its things")
    (state,) = check(sets, [name])
    assert state.ready, str(state)
    task = TASKS[name]
    folder = state.folder
    examples = task.examples(folder, task.variants[0])
    (perfect,) = evaluate(Oracle(examples, wrong=False), [name], sets, tmp_path / "right")
    assert perfect["coverage"]["missing"] == 0
    if name == "mmvet":
        assert perfect["headline"] is None
        assert (tmp_path / "right" / "mmvet" / "mmvet_result.json").exists()
        return
    (worse,) = evaluate(Oracle(examples, wrong=True), [name], sets, tmp_path / "wrong")
    if name == "vqav2":  # the way through TextVQA's normaliser loses unanimous answers that it rewrites
        rows = [
            {"question_id": e.question_id, "answer": a}
            for e, a in zip(examples, Oracle(examples, False).truth.values())
        ]
        perfect = score("vqav2", sets, put_json(tmp_path / "perfect.json", rows))
    assert perfect["headline"] == pytest.approx(BEST.get(name, 100.0))
    assert worse["headline"] < perfect["headline"] - 5


def test_no_paper_beside_drawn_scenes(sets: Path, tmp_path: Path) -> None:
    """The same files without the mark are taken for the real ones."""
    examples = TASKS["gqa"].examples(sets / "gqa", "llava")
    for paper in (None, TASKS["gqa"].paper):
        out = tmp_path / str(paper)
        found = evaluate(Oracle(examples, wrong=False), ["gqa"], sets, out)
        console = Console(file=io.StringIO(), width=120)
        console.print(table(found))
        page = report(out, tmp_path / "page.html").read_text()
        assert found[0]["paper"] == paper
        assert json.loads((out / "gqa" / "result.json").read_text())["paper"] == paper
        for text in (console.file.getvalue(), page):  # type: ignore[attr-defined]
            assert ("VL-Mamba 2.8b" in text) == ("56.2" in text) == (paper is not None)
            assert ("GQA (drawn scenes)" in text) == (paper is None)
        (sets / "gqa" / "drawn.json").unlink(missing_ok=True)
