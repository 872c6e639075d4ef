"""A run as one self-contained HTML page: scores, skills, answers with their pictures, and another run beside it."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from vlmamba.evaluation import page, results
from vlmamba.evaluation.files import write_atomically
from vlmamba.evaluation.own import OwnData
from vlmamba.evaluation.statistics import McNemar, interval, mcnemar
from vlmamba.evaluation.task import Task
from vlmamba.evaluation.tasks import TASKS

_THUMBNAIL = 280  # pixels, the longer side


@dataclass(frozen=True)
class Share:
    """A mean with its 95 % interval, all in per cent, over `count` questions."""

    name: str
    mean: float
    low: float
    high: float
    method: str
    count: int


@dataclass(frozen=True)
class Card:
    """One answer to look at. picture: a data URI, or "". other: the other run's answer and score, if there is one."""

    id: str
    skill: str
    prompt: str
    text: str
    parsed: str
    target: str
    score: float | None
    picture: str
    other: tuple[str, float | None] | None = None


@dataclass(frozen=True)
class Section:
    """One benchmark on the page. beside: the other run's score, if it has one."""

    result: Mapping[str, Any]
    share: Share | None
    skills: Sequence[Share]
    cards: Sequence[Card]
    comparison: McNemar | None = None
    differences: Sequence[Card] = field(default_factory=tuple)
    beside: float | None = None


def report(run: Path, out: Path, *, compare: Path | None = None, sample: int = 24) -> Path:
    """Write the page of a run to `out`.

    run, compare: a result file, or a folder with one or with one per task. sample: at most so many right, and so many
    wrong, answers of each benchmark are shown, drawn at random, always the same. Pictures come from
    the data folder that the result names; where it is gone the page does without."""
    if sample < 0:
        raise ValueError(f"sample is {sample}; expected how many answers are shown, 0 or more")
    found = {r["task"]: r for r in _results(Path(run))}
    others = {r["task"]: r for r in _results(Path(compare))} if compare is not None else {}
    if compare is not None and not set(found) & set(others):
        raise ValueError(f"{run} ({', '.join(found)}) and {compare} ({', '.join(others)}) have no task in common")
    if unknown := found.keys() - {*TASKS, "own"}:
        raise ValueError(f"{run} holds results of tasks that are not known here: {', '.join(sorted(unknown))}")
    sections = [_section(found[t], others.get(t), sample) for t in (*TASKS, "own") if t in found]
    html = page.render(Path(run).name, sections, Path(compare).name if compare is not None else None)
    write_atomically(Path(out), html)
    return Path(out)


def _results(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_dir() and not (path / "result.json").is_file():
        files = sorted(path.glob("*/result.json"))
        if not files:
            raise ValueError(f"{path} holds no result: expected result.json, in it or in a folder per task")
        yield from map(results.load, files)
    else:
        yield results.load(path)


def share(name: str, scores: Sequence[float]) -> Share:
    low, high, method = interval(scores)
    return Share(name, 100 * sum(scores) / len(scores), 100 * low, 100 * high, method, len(scores))


def _section(result: Mapping[str, Any], other: Mapping[str, Any] | None, sample: int) -> Section:
    rows = [row for row in result["answers"] if row.get("score") is not None]
    skills: dict[str, list[float]] = {}
    for row in rows:
        skills.setdefault(row["skill"], []).append(row["score"])
    pictures = _Pictures(result)
    chosen = _sample(rows or result["answers"], sample, random.Random(0))
    section = Section(
        result,
        share("all", [row["score"] for row in rows]) if rows else None,
        sorted((share(name, scores) for name, scores in skills.items()), key=lambda s: -s.count),
        [_card(row, pictures) for row in chosen],
    )
    if other is None:
        return section
    return _compared(replace(section, beside=other["headline"]), rows, other, pictures, sample)


def _compared(
    section: Section, rows: Sequence[Any], other: Mapping[str, Any], pictures: _Pictures, sample: int
) -> Section:
    second = {row["id"]: row for row in other["answers"] if row.get("score") is not None}
    pairs = [(row, second[row["id"]]) for row in rows if row["id"] in second]
    if other["data"]["questions"] != section.result["data"]["questions"] and not pairs:
        raise ValueError(f"both runs answered {section.result['title']}, but no question occurs in both")
    if not pairs:
        return section  # not judged, here or there: nothing to compare
    test = mcnemar([a["score"] for a, _ in pairs], [b["score"] for _, b in pairs])
    apart = [(a, b) for a, b in pairs if (a["score"] >= 0.5) != (b["score"] >= 0.5)]
    cards = [_card(a, pictures, (b["text"] or "", b["score"])) for a, b in apart[: 2 * sample]]
    return replace(section, comparison=test, differences=cards)


def _sample(rows: Sequence[Any], sample: int, generator: random.Random) -> list[Any]:
    right = [row for row in rows if (row.get("score") or 0) >= 0.5]
    wrong = [row for row in rows if (row.get("score") or 0) < 0.5]
    return [row for part in (wrong, right) for row in generator.sample(part, min(sample, len(part)))]


def _card(row: Mapping[str, Any], pictures: _Pictures, other: tuple[str, float | None] | None = None) -> Card:
    return Card(
        id=row["id"],
        skill=row["skill"],
        prompt=row["prompt"] or pictures.prompt(row["id"]),
        text="(no answer)" if row["text"] is None else row["text"],
        parsed=row.get("parsed", ""),
        target=row["target"],
        score=row.get("score"),
        picture=pictures.thumbnail(row["id"]),
        other=other,
    )


class _Pictures:
    """Pictures and prompts of a result's data set, where its folder is still there."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        images = result["data"].get("images")
        own = OwnData(images=None if images is None else Path(images))
        task: Task = own if result["task"] == "own" else TASKS[result["task"]]
        try:
            examples = task.examples(Path(result["data"]["folder"]), task.scoring_variant)
        except ValueError:
            examples = []  # moved or deleted: the page says so where the picture would be
        self._examples = {example.id: example for example in examples}

    def prompt(self, qid: str) -> str:
        return self._examples[qid].prompt if qid in self._examples else ""

    def thumbnail(self, qid: str) -> str:
        source = self._examples[qid].image if qid in self._examples else None
        if source is None:
            return ""
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                small = image.convert("RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            return ""
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
