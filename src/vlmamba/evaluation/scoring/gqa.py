"""GQA's metrics as the GQA authors' script computes them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from vlmamba.evaluation.scoring.vqa import plain_sum

# Steps that only read off the result do not count as reasoning steps; matched anywhere in "operation: argument".
_FINAL_STEPS = ("exist", "query: name", "choose name")


def prediction(text: str) -> str:
    """An answer as LLaVA hands it to the GQA script: final periods go, lower case. Nothing else: inner blanks, commas
    and "Yes, it is" stay, and are wrong."""
    return text.rstrip(".").lower()


def _percent(values: Sequence[float]) -> float:
    return plain_sum(values) / len(values) * 100 if values else 0


def _steps(question: Mapping[str, Any]) -> int:
    texts = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(1 for text in texts if not any(final in text for final in _FINAL_STEPS))


def _belongs(answer: str, group: Sequence[str], question: Mapping[str, Any]) -> bool:
    # "What do both have in common?" has only these three valid answers, whatever the choices file lists.
    if "Common" in question["types"]["detailed"]:
        group = ["color", "material", "shape"]
    return answer in group


def _consistency(qid: str, question: Mapping[str, Any], questions: Mapping, answers: Mapping[str, str]) -> float | None:
    """Mean accuracy over what follows from a rightly answered question; None where nothing else does."""
    entailed = [other for other in question["entailed"] if other != qid]
    # Questions outside the file (test-dev balanced entails unbalanced ones) cannot be looked up. The script dies on
    # them; here they are left out.
    entailed = [other for other in entailed if other in questions]
    if not entailed:
        return None
    return plain_sum(float(answers.get(other) == questions[other]["answer"]) for other in entailed) / len(entailed)


def chi_square(gold: Mapping[str, Counter[str]], predicted: Mapping[str, Counter[str]]) -> float:
    """Chi-square between the gold and the predicted answers of each group, weighted by the group's size."""
    total, weight = 0.0, 0
    for group, answers in gold.items():
        size = sum(answers.values())
        # Only answers that occur in the gold: what is predicted beyond them costs nothing here.
        score = plain_sum((predicted[group].get(answer, 0) - count) ** 2 / count for answer, count in answers.items())
        total += score * size
        weight += size
    return total / weight if weight else 0.0


def score_gqa(
    questions: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    consistency: bool = False,
) -> dict[str, Any]:
    """All numbers of the GQA script, in per cent (`distribution`: chi-square / 100, lower is better).

    questions: the official file; answers: id to prediction, already converted; choices: id to valid and plausible
    answers. Only balanced questions are scored. A question without an answer is wrong. Without `choices` validity and
    plausibility are 0, without `consistency` it is 0, as in the script."""
    flat: dict[str, list[float]] = {name: [] for name in ("accuracy", "binary", "open", "validity", "plausibility")}
    flat["consistency"] = []
    tables: dict[str, dict[Any, list[float]]] = {
        f"accuracyPer{name}": defaultdict(list) for name in ("StructuralType", "SemanticType", "Length", "Steps")
    }
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for qid, question in questions.items():
        if not question["isBalanced"]:
            continue
        answer = answers.get(qid, "")
        score = float(answer == question["answer"])
        types = question["types"]
        flat["accuracy"].append(score)
        flat["open" if types["structural"] == "query" else "binary"].append(score)
        tables["accuracyPerStructuralType"][types["structural"]].append(score)
        tables["accuracyPerSemanticType"][types["semantic"]].append(score)
        tables["accuracyPerLength"][str(len(question["question"].split()))].append(score)
        tables["accuracyPerSteps"][str(_steps(question))].append(score)
        for name, key in (("validity", "valid"), ("plausibility", "plausible")):
            flat[name].append(float(choices is not None and _belongs(answer, choices[qid][key], question)))
        group = question["groups"]["global"]
        if group is not None:  # an empty string is a group like any other
            gold[group][question["answer"]] += 1
            predicted[group][answer] += 1
        if consistency and score:
            entailed = _consistency(qid, question, questions, answers)
            if entailed is not None:
                flat["consistency"].append(entailed)
    result: dict[str, Any] = {name: _percent(values) for name, values in flat.items()}
    result |= {name: {t: [_percent(v), len(v)] for t, v in table.items()} for name, table in tables.items()}
    result["distribution"] = chi_square(gold, predicted) / 100
    return result
