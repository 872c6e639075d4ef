"""MM-Vet: reading the judge's grades, and totals per capability and per set of capabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

PARSES = 5
# Asked again with this line added, as the official script does.
ASK_AGAIN = "\nPredict the correctness of the answer (digit): "

# (prompt, temperature) to the judge's reply.
AskGrade = Callable[[str, float], str]


def judge_prompt(few_shot: str, question: str, truth: str, answer: str) -> str:
    """What the judge reads: the few-shot text, then the row whose last cell it has to fill in."""
    truth = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return f"{few_shot}\n{question} | {truth} | {answer} | "


def parse_grade(reply: str) -> float | None:
    """The first blank-separated piece of a reply as a grade; None where it is no number in [0, 1].

    Only blanks part the pieces: a reply that begins with one has an empty first piece and fails, as does "0.9."."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    # The script fails a grade only when it is above 1 or below 0, so "nan" passes its test; here it does not.
    return grade if 0.0 <= grade <= 1.0 else None


def grade(prompt: str, ask: AskGrade) -> tuple[float, list[str]]:
    """One graded answer and the replies on the way to it. At most five replies are parsed; then the grade is 0.

    The script raises the temperature by 0.5 with each repeat after the second call, and asks a sixth time before it
    gives up: the last reply is not read."""
    replies = [ask(prompt, 0.0)]
    temperature = 0.0
    while (value := parse_grade(replies[-1])) is None:
        replies.append(ask(prompt + ASK_AGAIN, temperature))
        temperature += 0.5
        if len(replies) > PARSES:
            return 0.0, replies
    return value, replies


def score_mmvet(metadata: Mapping[str, Mapping[str, Any]], grades: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Totals x 100, rounded to one decimal as numpy rounds (0.05 to 0.0): `total`, `std` and `runs` over runs,
    `perCapability`, `perCapabilitySet`.

    grades: id to one grade per run. An ungraded question counts as 0, since every denominator is the data set's."""
    runs = max((len(values) for values in grades.values()), default=0)
    if runs == 0:
        raise ValueError("MM-Vet cannot be scored without grades: no question has one")

    def per_run(ids: list[str]) -> np.ndarray:
        sums = [0.0] * runs
        for qid in ids:
            for i, value in enumerate(grades.get(qid, ())):
                sums[i] += value
        return np.array(sums) / len(ids) * 100

    def mean(ids: list[str]) -> float:
        return float(np.round(per_run(ids).mean(), 1))

    by_name: dict[str, list[str]] = {}
    for qid, item in metadata.items():
        for capability in set(item["capability"]):
            by_name.setdefault(capability, []).append(qid)
    sets = {
        "_".join(sorted(chosen)): mean(
            [qid for qid, item in metadata.items() if frozenset(item["capability"]) == chosen]
        )
        for chosen, _ in Counter(frozenset(item["capability"]) for item in metadata.values()).most_common()
    }
    total = per_run(list(metadata))
    return {
        "total": float(np.round(total.mean(), 1)),
        "std": float(np.round(total.std(), 1)),
        "runs": np.round(total, 1).tolist(),
        "perCapability": {name: mean(ids) for name, ids in sorted(by_name.items(), key=lambda kv: -len(kv[1]))},
        "perCapabilitySet": sets,
    }
