"""What a trained model can do, in percent: benchmarks, skills, controls without the picture or with its patches
shuffled, and how well it finds a row of a table again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from itertools import count, islice
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from studies.ablations.plan import Study
from studies.nano_skills import SEED, Asked, Look, Scores, answer, ask, by_group, score, scored, shuffled, summarise
from vlmamba.commands.answerer import ModelAnswerer
from vlmamba.commands.evaluate import answerer_of
from vlmamba.commands.load import load
from vlmamba.data.scenes import Question, World
from vlmamba.evaluation import TASKS, evaluate
from vlmamba.evaluation.api import folder_of
from vlmamba.evaluation.task import Task

BATCH = 256
WITHOUT_OCR = {"textvqa": "no-ocr"}
"""The usual prompt of TextVQA lists the words in the picture: a model could answer without reading."""


def measure(study: Study, model: Path, scratch: Path) -> dict[str, Any]:
    """All numbers of one run; the benchmarks' answers go to `scratch`."""
    loaded = load(str(model), study.device)
    answerer = answerer_of(loaded, model.parent.name, model)
    scale = study.scale
    asked, tables = questions(scale.questions), keyed(scale.probe)

    def scores(of: Sequence[Asked], look: Look = lambda a: a.image) -> Scores:
        return scored(of, answer(answerer, of, look, BATCH, scale.longest))

    seen, few = scores(asked), asked[: scale.control]
    return {
        "connector_parameters": sum(p.numel() for p in loaded.model.connector.parameters()),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "benchmarks": benchmarks(answerer, study, scratch),
        "skills": by_group(seen),
        "controls": {
            "picture": summarise(seen[: len(few)]),
            "shuffled": summarise(scores(few, shuffled)),
            "none": summarise(scores(few, None)),
        },
        "probe": probe(scores([asked for asked, *_ in tables]), tables),
    }


def benchmarks(answerer: ModelAnswerer, study: Study, scratch: Path) -> dict[str, dict[str, float | None]]:
    """Headline and its standard error by benchmark. MM-Vet, whose headline is a judge's, gets the F1 of the words."""

    def has(task: Task) -> bool:
        return not task.annotations(folder_of(task, study.benchmarks))

    found = {}
    for result in evaluate(
        answerer,
        [_brief(task, study.scale.longest) for task in TASKS.values() if has(task)],
        study.benchmarks,
        scratch,
        variants=WITHOUT_OCR,
        batch_size=BATCH,
    ):
        value, error = result["headline"], result["standard_error"]
        if result["task"] == "mmvet":
            rows = [(row["text"] or "", row["target"].replace("<AND>", " ")) for row in result["answers"]]
            shared = [100 * score(Question("open", "", target, kind="open"), text) for text, target in rows]
            value, error = mean(shared), pstdev(shared) / len(shared) ** 0.5  # one question a picture
        found[result["task"]] = {"score": value, "error": error}
    return found


def _brief(task: Task, longest: int) -> Task:
    """The task with answers of at most so many tokens: one that never ends is wrong anyway."""
    task = copy.copy(task)
    task.max_new_tokens = min(task.max_new_tokens, longest)
    return task


@lru_cache(maxsize=1)
def questions(number: int) -> list[Asked]:
    """Of the test split; the same for all runs."""
    return ask("test", number)


@lru_cache(maxsize=1)
def keyed(number: int) -> list[tuple[Asked, int, int]]:
    """Questions that name a row of a table by one of its cells and want the other; with the table's rows and the row,
    counted from the top."""
    world = World(SEED + 2, "test", kinds={"table": 1.0})

    def every() -> Any:
        for index in count():
            scene = world.scene(index)
            if scene.table is None or not scene.table.keyed:
                continue
            sample = world.sample(index)
            for question in sample.questions:
                places = {i.row for i in scene.items if question.answer == (i.colour if i.kind == "patch" else i.name)}
                wanted = question.form.removeprefix("lookup.") in {i.kind for i in scene.items}
                if wanted and len(places) == 1:
                    yield Asked(index, len(scene.items), sample.image, question), scene.table.rows, places.pop() + 1

    return list(islice(every(), number))


def probe(scores: Scores, tables: Sequence[tuple[Asked, int, int]]) -> dict[str, Any]:
    """Accuracy by the number of a table's rows, and by the row that is asked for."""
    by: dict[str, dict[str, Scores]] = {"rows": {}, "row": {}}
    for pair, (_, rows, row) in zip(scores, tables, strict=True):
        by["rows"].setdefault(str(rows), []).append(pair)
        by["row"].setdefault(str(row), []).append(pair)
    return {name: {key: summarise(by[name][key]) for key in sorted(by[name])} for name in by}
