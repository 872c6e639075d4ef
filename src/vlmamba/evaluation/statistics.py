"""How sure a score is: confidence intervals, and whether two runs differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z95 = 1.959963984540054


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share of right answers; (0, 1) where nothing was asked."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = right / total, _Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(scores: Sequence[float]) -> tuple[float, float]:
    """A 95 % percentile interval for the mean of scores, for those that are not just right or wrong."""
    values = np.asarray(scores, dtype=float)
    if values.size == 0:
        return 0.0, 1.0
    generator = np.random.default_rng(0)
    # One sample at a time: a benchmark of 200,000 questions times 2000 would not fit into memory.
    means = [values[generator.integers(0, values.size, values.size)].mean() for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def interval(scores: Sequence[float]) -> tuple[float, float, str]:
    """The 95 % interval of a mean and the method's name: Wilson's for right-or-wrong scores, else the bootstrap's."""
    if all(score in (0.0, 1.0) for score in scores):
        return *wilson(sum(1 for score in scores if score), len(scores)), "Wilson"
    return *bootstrap(scores), "bootstrap"


@dataclass(frozen=True)
class McNemar:
    """Two runs on the same questions: how many both, one, and neither got right, and the exact two-sided p value."""

    both: int
    first_only: int
    second_only: int
    neither: int
    p: float


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """McNemar's exact test; a score of at least a half counts as right."""
    if len(first) != len(second):
        raise ValueError(f"both runs must answer the same questions: found {len(first)} and {len(second)}")
    pairs = [(a >= 0.5, b >= 0.5) for a, b in zip(first, second)]
    first_only, second_only = pairs.count((True, False)), pairs.count((False, True))
    return McNemar(
        pairs.count((True, True)),
        first_only,
        second_only,
        pairs.count((False, False)),
        _binomial_two_sided(min(first_only, second_only), first_only + second_only),
    )


def _binomial_two_sided(few: int, n: int) -> float:
    """P that a fair coin falls at least as unevenly as `few` of `n`."""
    if n == 0:
        return 1.0
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(few + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))
