"""The result of one benchmark as a file: everything needed to trust, repeat or compare it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from vlmamba import __version__
from vlmamba.evaluation.files import fingerprint, load_json, require
from vlmamba.evaluation.task import Joined, Options, Score, Task
from vlmamba.evaluation.uncertainty import standard_error

FORMAT = 1
# What every result has, and a report needs.
_FIELDS = (
    *("format", "task", "title", "task_version", "metric", "headline", "paper", "run", "data", "software", "finished"),
    *("coverage", "notes", "metrics", "answers"),
)
_DRAWN = "drawn.json"  # `vlmamba data scenes` leaves it in its sets


def weights_hash(folder: Path) -> str:
    """The first 16 hex digits of the SHA-256 of all weight files of a saved model, in the order of their names."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not files:
        raise ValueError(f"{folder} holds no weights (*.safetensors or *.bin)")
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]


def build(
    task: Task, joined: Joined, score: Score, options: Options, folder: Path, run: Mapping[str, Any]
) -> dict[str, Any]:
    """A result: run (model, weights, decoding, variant, or the file that was scored), numbers, and every answer.

    Of drawn scenes in a benchmark's layout the title says that they are, and the paper's number is left out."""
    answers, images, drawn = joined.last, task.image_folder(), (folder / _DRAWN).is_file()
    rows = []
    for example in joined.examples:
        prediction, outcome = answers.get(example.id), score.outcomes.get(example.id)
        row = {
            "task": task.name,
            "id": example.id,
            "question_id": example.question_id,
            # As it was asked; of answers that came without, nothing is claimed.
            "prompt": prediction.prompt if prediction else None,
            "text": prediction.text if prediction else None,
            "target": example.target,
            "skill": example.skill,
        }
        if outcome is not None:
            row |= {"parsed": outcome.parsed, "score": outcome.score}
        rows.append(row)
    return {
        "format": FORMAT,
        "task": task.name,
        "title": f"{task.title} (drawn scenes)" if drawn else task.title,
        "task_version": task.version,
        "metric": task.metric,
        "headline": score.headline,
        "standard_error": standard_error(task, joined, score, folder, options),
        "paper": None if drawn else task.paper,
        "run": dict(run),
        "options": {
            "mmbench_rule": options.rule,
            "judge": options.judge.model if options.judge else None,
            "few_shot": None if options.few_shot is None else fingerprint([options.few_shot]),
            "judge_runs": options.runs,
        },
        "data": {
            "folder": str(folder),
            "images": str(images) if images is not None else None,
            "questions": fingerprint(f"{e.id}\0{e.target}" for e in joined.examples),
        },
        "software": f"vlmamba {__version__}",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "coverage": joined.coverage(),
        "notes": score.notes,
        "metrics": score.metrics,
        "answers": [row for row in rows if row["text"] is not None or "score" in row],
    }


def load(path: Path) -> dict[str, Any]:
    """A result file, or the one in a run's folder."""
    path = path / "result.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no result file {path}: `vlmamba eval` and `vlmamba score --json` write them")
    result = dict(require(load_json(path), _FIELDS, str(path)))
    if result["format"] != FORMAT:
        raise ValueError(f"{path} has format {result['format']}, this version reads {FORMAT}")
    require(result["data"], ["folder", "questions"], f"{path}, data")
    for number, row in enumerate(result["answers"], 1):
        require(row, ["id", "prompt", "text", "target", "skill"], f"{path}, answer {number}")
    return result


def brief(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics without what stands per question: tables longer than a screen."""
    short = {}
    for key, value in metrics.items():
        value = brief(value) if isinstance(value, dict) and len(value) <= 60 else value
        if not isinstance(value, (dict, list)) or len(value) <= 60:
            short[key] = value
    return short


def table(results: Sequence[Mapping[str, Any]], name: str = "this run") -> Table:
    """The headlines with their standard errors, beside the paper's where it has any."""
    published = any(result["paper"] is not None for result in results)
    grid = Table("benchmark", "metric")
    for title in ("questions", *(["VL-Mamba 2.8b (paper)"] if published else []), name):
        grid.add_column(title, justify="right")
    for result in results:
        paper = ["" if result["paper"] is None else f"{result['paper']:.1f}"] if published else []
        grid.add_row(result["title"], result["metric"], f"{result['coverage']['questions']:,}", *paper, _number(result))
    return grid


def _number(result: Mapping[str, Any]) -> str:
    value, error = result["headline"], result.get("standard_error")
    if value is None:
        return "not scored"
    return f"{value:.1f}" if error is None else f"{value:.1f} ± {error:.1f}"
