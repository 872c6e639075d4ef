"""The standard error of a benchmark's headline: questions on one picture stand or fall together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from vlmamba.evaluation.runner import by_picture
from vlmamba.evaluation.task import Joined, Options, Score, Task, mean_score

BLOCKS = 50


def standard_error(task: Task, joined: Joined, score: Score, folder: Path, options: Options) -> float | None:
    """Of `score.headline`, in its unit, pictures taken as drawn at random. None where there is no headline, fewer than
    two pictures."""
    groups = by_picture(joined.examples)
    if score.headline is None or len(groups) < 2:
        return None
    # MM-Vet's script rounds to one decimal, the others to two or not at all.
    rounding = 0.051 if score.headline == round(score.headline, 1) else 0.01
    if abs(100 * mean_score(score.outcomes) - score.headline) < rounding:
        return _of_mean([[score.outcomes[e.id].score for e in group if e.id in score.outcomes] for group in groups])
    blocks = [{e.id for group in groups[i::BLOCKS] for e in group} for i in range(min(BLOCKS, len(groups)))]
    return _jackknife([task.score(_without(joined, block), folder, options).headline for block in blocks])


def _of_mean(groups: Sequence[Sequence[float | None]]) -> float | None:
    """Of the mean, in percent, of scores in groups that are drawn together."""
    scores = [[score for score in group if score is not None] for group in groups]
    count, total = sum(map(len, scores)), sum(map(sum, scores))
    filled = sum(map(bool, scores))
    if filled < 2:
        return None
    squares = math.fsum((sum(group) - len(group) * total / count) ** 2 for group in scores)
    return 100 * math.sqrt(squares * filled / (filled - 1)) / count


def _jackknife(values: Sequence[float | None]) -> float | None:
    """From what a number becomes when one block of the data after the other is left out."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    mean = sum(known) / len(known)
    return math.sqrt((len(known) - 1) / len(known) * math.fsum((value - mean) ** 2 for value in known))


def _without(joined: Joined, ids: set[str]) -> Joined:
    pairs = [(example, prediction) for example, prediction in joined.pairs if example.id not in ids]
    return Joined([example for example in joined.examples if example.id not in ids], pairs, [])
