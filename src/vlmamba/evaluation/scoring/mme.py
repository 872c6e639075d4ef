"""MME: fourteen yes-or-no tasks, two questions an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmamba.evaluation.scoring.vqa import plain_sum

TASKS: dict[str, tuple[str, ...]] = {
    "Perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "Cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip


def on_one_line(text: str) -> str:
    """An answer as the tool keeps it, on one line of a file with tabs between cells."""
    return text.replace("\r", " ").replace("\n", " ").replace("\t", " ")


def parse(text: str) -> str:
    """ "yes", "no" or "other", from the first four characters of the answer in lower case, "yes" asked first.

    Quirks: "Not" and "know" mean no, "eyes" means yes, "    yes" and "The answer is yes" mean neither."""
    head = on_one_line(text).lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def _score_task(images: Iterable[Sequence[tuple[str, str]]]) -> dict[str, Any]:
    counts = {"TP": 0, "FN": 0, "TN": 0, "FP": 0}
    right, total, pairs_right, pairs, other = 0, 0, 0, 0, 0
    for questions in images:
        hits = 0
        for text, gold in questions:
            said, truth = parse(text), gold.lower()
            hits += said == truth
            other += said == "other"
            if said != "other":  # neither yes nor no counts as wrong, but stays out of the table
                counts[("T" if said == truth else "F") + ("P" if said == "yes" else "N")] += 1
        right, total, pairs = right + hits, total + len(questions), pairs + 1
        pairs_right += hits == len(questions)
    tp, fn, _, fp = counts.values()
    return {
        **counts,
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "other_num": other,
        "acc": right / total if total else 0.0,
        "acc_plus": pairs_right / pairs if pairs else 0.0,
    }


def score_mme(tasks: Mapping[str, Iterable[Sequence[tuple[str, str]]]]) -> dict[str, Any]:
    """`scores`: both totals and the tasks' 100 x accuracy + 100 x accuracy+; `detail`: the tables behind them.

    tasks: task name to its images, each a sequence of (answer, gold "Yes" or "No"). Accuracy+ wants all questions of
    an image right. A task that is absent is left out of the sum."""
    detail = {name: _score_task(images) for name, images in tasks.items()}
    scores: dict[str, Any] = {}
    for group, names in TASKS.items():
        # Two additions in this order, as the tool does: 100 x (acc + acc_plus) would differ in the last digit.
        table = {n: detail[n]["acc"] * 100 + detail[n]["acc_plus"] * 100 for n in names if n in detail}
        scores[group] = {"tasks": table, "total": plain_sum(table.values())}
    return {"scores": scores, "detail": detail}
