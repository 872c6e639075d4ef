"""What the command line calls: check a folder, evaluate an answerer, score anybody's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmamba.evaluation import results, runner
from vlmamba.evaluation.files import naming, write_json
from vlmamba.evaluation.predictions import join, read_predictions
from vlmamba.evaluation.task import Example, Joined, Options, Prediction, Task
from vlmamba.evaluation.tasks import TASKS, get_task

Say = Callable[[str], None]


def _silent(text: str) -> None:
    """Nobody listens."""


def folder_of(task: Task, data: Path) -> Path:
    """Where in a common data folder (or itself) a benchmark's files are; the likeliest place when they are not."""
    places = [data / name for name in task.folders] + [data]
    for place in places:
        if place.is_dir() and not task.annotations(place):
            return place
    return next((place for place in places[:-1] if place.is_dir()), data)


def _examples(task: Task, folder: Path, variant: str) -> list[Example]:
    with naming(f"{task.title}'s annotations", folder):
        return task.examples(folder, variant)


@dataclass(frozen=True)
class Check:
    """What a benchmark's folder lacks. missing: annotation files, by name, or what is wrong with one."""

    task: str
    folder: Path
    missing: Sequence[str]
    questions: int
    images: int
    images_missing: Sequence[Path]
    source: str

    @property
    def ready(self) -> bool:
        return not self.missing and not self.images_missing

    def __str__(self) -> str:
        if self.ready:
            return f"{self.task}: ready, {self.questions} questions, {self.images} pictures ({self.folder})"
        lines = [f"{self.task}: not ready ({self.folder})", *(f"  {text}" for text in self.missing)]
        if self.images_missing:
            count = f"{len(self.images_missing)} of {self.images} pictures"
            lines.append(f"  {count} are missing, such as {self.images_missing[0]}")
        return "\n".join([*lines, f"  {self.source}"])


def check(data: Path, tasks: Sequence[str] | None = None) -> list[Check]:
    """What is missing from `data` for each task (all eight by default), and where to get it."""
    return [_check(get_task(name), Path(data)) for name in tasks or TASKS]


def _check(task: Task, data: Path) -> Check:
    folder = folder_of(task, data)
    missing = task.annotations(folder) if folder.is_dir() else [f"the folder {folder} does not exist"]
    if missing:
        return Check(task.name, folder, missing, 0, 0, [], task.source)
    try:
        examples = _examples(task, folder, task.variants[0])
    except ValueError as error:
        return Check(task.name, folder, [str(error)], 0, 0, [], task.source)
    paths = dict.fromkeys(example.image for example in examples if example.image is not None)
    lacking = [path for path in paths if isinstance(path, Path) and not path.is_file()]
    return Check(task.name, folder, [], len(examples), len(paths), lacking, task.source)


def score(
    task: str | Task,
    data: Path,
    predictions: Path,
    *,
    options: Options | None = None,
    out: Path | None = None,
    submissions: Path | None = None,
    say: Say = _silent,
) -> dict[str, Any]:
    """Score anybody's answers to a benchmark; the result, also written to `out` when given.

    predictions: our own answers, LLaVA's, or the benchmark's submission format. submissions: a folder for the files
    that a server or a judge takes. ValueError for a wrong folder, a damaged file or another benchmark's answers."""
    task = get_task(task) if isinstance(task, str) else task
    options = options or Options()
    folder = folder_of(task, Path(data))
    examples = _examples(task, folder, task.scoring_variant)
    joined = join(task, examples, read_predictions(task, Path(predictions)), str(predictions))
    result = _scored(task, joined, folder, options, {"predictions": str(predictions)}, say)
    if submissions is not None:
        _submit(task, joined, folder, Path(submissions), say)
    if out is not None:
        write_json(Path(out), result)
    return result


def evaluate(
    answerer: runner.Answerer,
    tasks: Sequence[str | Task],
    data: Path,
    out: Path,
    *,
    variants: Mapping[str, str] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    shard: runner.Shard | None = None,
    options: Options | None = None,
    say: Say = _silent,
) -> list[dict[str, Any]]:
    """Ask an answerer all questions of the tasks and score its answers; a result per task.

    Every task gets a folder in `out`: the answers as they come, then `result.json` and what is to be submitted. The
    same call again asks only what has no answer yet. variants: prompt variant by task. limit: only the first so many
    questions. shard: this process's part; processes other than the first return an empty list. Nothing is asked
    before every task's files have been read."""
    options, shard = options or Options(), shard or runner.Shard()
    chosen = [get_task(task) if isinstance(task, str) else task for task in tasks]
    unknown = sorted(set(variants or {}) - {task.name for task in chosen})
    if unknown:
        raise ValueError(f"prompt variants are given for tasks that are not evaluated: {', '.join(unknown)}")
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1 question, found {limit}")
    prepared = []
    for task in chosen:
        variant = task.checked_variant((variants or {}).get(task.name))
        folder = folder_of(task, Path(data))
        prepared.append((task, variant, folder, _examples(task, folder, variant)[:limit]))
    finished = []
    for task, variant, folder, examples in prepared:
        place = Path(out) / task.name
        run = runner.identity_of(task, examples, variant, answerer)
        runner.claim_folder(place, run)
        answers = runner.ask(task, examples, answerer, place, shard, batch_size)
        if answers is None:
            continue
        predictions = [Prediction(r["question_id"], r["text"], r["prompt"], r) for r in answers.values()]
        joined = join(task, examples, predictions, str(place))
        result = _scored(task, joined, folder, options, run | {"limit": limit}, say)
        _submit(task, joined, folder, place, say)
        write_json(place / "result.json", result)
        finished.append(result)
    return finished


def _scored(
    task: Task, joined: Joined, folder: Path, options: Options, run: Mapping[str, Any], say: Say
) -> dict[str, Any]:
    if options.judge is not None:
        prompts, tokens = task.judge_prompts(joined, options)
        if prompts:
            say(f"{task.title}: judging takes {options.judge.estimate(prompts, tokens)}")
    scored = task.score(joined, folder, options)
    if run.get("limit") is not None:
        scored.notes.append(f"only the first {run['limit']} questions were asked")
    return results.build(task, joined, scored, options, folder, run)


def _submit(task: Task, joined: Joined, folder: Path, out: Path, say: Say) -> None:
    try:
        path = task.write_submission(joined, folder, out)
    except ValueError as error:  # a missing third-party library: the scores do not depend on it
        say(f"{task.title}: no submission file: {error}")
        return
    if path is not None:
        say(f"{task.title}: wrote {path}")
