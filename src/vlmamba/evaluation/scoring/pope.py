"""POPE: is the object there? Yes is the positive answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import fsum
from typing import Any


def parse(text: str) -> str:
    """ "yes" or "no": no where `No`, `not` or `no` stands among the words before the first period, else yes.

    Quirks: only single blanks part words, so "yes\\nno" is one word and means yes; "NO", "nope" and an empty answer
    mean yes as well; "yes and no" means no."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


def score_split(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """One split's table from (answer, label) pairs. Any label but "no" is yes, as in the tool."""
    counts = {"TP": 0, "FP": 0, "TN": 0, "FN": 0}
    for text, label in pairs:
        said, truth = parse(text) == "yes", label != "no"
        counts[("T" if said == truth else "F") + ("P" if said else "N")] += 1
    tp, fp, tn, fn = counts.values()
    n = tp + fp + tn + fn
    # The tool divides by zero where a model never says yes; such a precision, recall or F1 is 0 here.
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    accuracy, yes_ratio = ((tp + tn) / n, (tp + fp) / n) if n else (0.0, 0.0)
    return {
        "n": n,
        **counts,
        "accuracy": accuracy,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": yes_ratio,
    }


def score_pope(splits: Mapping[str, Iterable[tuple[str, str]]]) -> dict[str, Any]:
    """Each split's table, and the means of F1 (the headline) and accuracy over the splits, as fractions."""
    tables = {name: score_split(pairs) for name, pairs in splits.items()}
    # The mean over splits is nobody's tool, only everybody's headline: rounded once, so no order of splits matters.
    means = {f"mean_{key}": fsum(t[key] for t in tables.values()) / (len(tables) or 1) for key in ("f1", "accuracy")}
    return {**tables, **means}
