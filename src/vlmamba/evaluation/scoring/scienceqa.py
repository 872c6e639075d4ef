"""ScienceQA as LLaVA's script parses it, and by subject, context and grade as the authors' script reports it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

OPTIONS = "ABCDE"
# The last period is a regex wildcard: "The answer is B!" matches, "The answer is B" at the very end does not.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def parse(text: str) -> str:
    """The letter an answer names, or "FAILED"."""
    if len(text) == 1 and text in OPTIONS:
        return text
    if len(text) >= 3 and text[0] in OPTIONS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else "FAILED"


def predicted_index(text: str, choices: int) -> int:
    """The option an answer names; -1 where it names none, or one beyond the question's choices."""
    letter = parse(text)
    return OPTIONS.index(letter) if letter in OPTIONS[:choices] else -1


def _by_condition(rows: list[tuple[Mapping[str, Any], bool]]) -> dict[str, float]:
    def accuracy(holds: Callable[[Mapping[str, Any]], bool]) -> float:
        right = [correct for problem, correct in rows if holds(problem)]
        # -1 where no problem answers the description, as the authors' table prints it.
        return sum(right) / len(right) * 100 if right else -1

    lower, upper = {f"grade{i}" for i in range(1, 7)}, {f"grade{i}" for i in range(7, 13)}
    table = {
        "natural": accuracy(lambda p: p["subject"] == "natural science"),
        "social": accuracy(lambda p: p["subject"] == "social science"),
        "language": accuracy(lambda p: p["subject"] == "language science"),
        "has_text": accuracy(lambda p: bool(p["hint"])),
        "has_image": accuracy(lambda p: bool(p["image"])),
        "no_context": accuracy(lambda p: not p["hint"] and not p["image"]),
        "grade_1_6": accuracy(lambda p: p["grade"] in lower),
        "grade_7_12": accuracy(lambda p: p["grade"] in upper),
        "average": accuracy(lambda p: True),
    }
    for topic in sorted({p["topic"] for p, _ in rows}):
        table[topic] = accuracy(lambda p, topic=topic: p["topic"] == topic)  # type: ignore[misc]
    return table


def score_scienceqa(problems: Mapping[str, Mapping[str, Any]], answers: Mapping[str, tuple[str, bool]]) -> dict:
    """LLaVA's accuracy over all problems and over those with an image, and the authors' table, in per cent.

    problems: the split's problems in its order; answers: id to (text, whether the prompt held an image). A missing
    answer is wrong, and counts among no image's problems: LLaVA asks the answer's prompt, not the problem."""
    per_question: dict[str, dict[str, Any]] = {}
    for pid, problem in problems.items():
        text, has_image = answers.get(pid, ("FAILED", False))
        index = predicted_index(text, len(problem["choices"]))
        per_question[pid] = {
            "parsed": parse(text),
            "index": index,
            "correct": index == problem["answer"],
            "is_multimodal": has_image,
        }
    right = [q["correct"] for q in per_question.values()]
    with_image = [q["correct"] for q in per_question.values() if q["is_multimodal"]]
    return {
        "acc": sum(right) / len(right) * 100,
        "correct": sum(right),
        "count": len(right),
        "img_acc": sum(with_image) / len(with_image) * 100 if with_image else 0.0,
        "img_correct": sum(with_image),
        "img_count": len(with_image),
        "byCondition": _by_condition([(problems[pid], q["correct"]) for pid, q in per_question.items()]),
        "perQuestion": per_question,
    }
