"""VQA accuracy as two published tools compute it: the evaluator of the VQA authors, and M4C's for TextVQA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlmamba.evaluation.scoring.contractions import CONTRACTIONS

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # apostrophe, colon, $, % and & are not among them
_PERIOD = re.compile(r"\.(?!\d)")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# Both tools call `pattern.sub("", text, re.UNICODE)`: the flag lands in the place of `count`, and its value is 32.
_PERIODS_AT_MOST = 32
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(_DIGITS)}}
_ARTICLES = {"a", "an", "the"}


def plain_sum(values: Iterable[float]) -> float:
    """Sum from left to right. From Python 3.12 on, `sum` of floats compensates rounding and gives other last digits
    than the runs that the published numbers come from."""
    total = 0.0
    for value in values:
        total += value
    return total


def _strip_punctuation(text: str, has_number_comma: bool) -> str:
    out = text
    for mark in _PUNCTUATION:
        # Asked of the original text, whatever earlier marks have done to `out` meanwhile; and a comma between two
        # digits anywhere ("1,000 red-hot") has every mark deleted, not only the comma.
        if mark + " " in text or " " + mark in text or has_number_comma:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    # A period goes unless a digit follows it: "10.5" keeps its own, "10." does not.
    return _PERIOD.sub("", out, count=_PERIODS_AT_MOST)


def _map_words(text: str) -> str:
    # The article test looks at the word after its number mapping, and contractions come last: an article made by a
    # contraction would stay.
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()  # "\r" and others stay, as in the tools


def normalize_vqa(text: str) -> str:
    """An answer as the VQA evaluator compares it, when it normalises at all."""
    text = _one_line(text)
    return _map_words(_strip_punctuation(text, _DIGIT_COMMA_DIGIT.search(text) is not None))


def normalize_m4c(text: str) -> str:
    """An answer as M4C's TextVQA evaluator compares it (and as LLaVA submits its VQAv2 answers).

    A blank before every 's, so that "mother's" becomes "mother 's" and can never match a ground truth that went
    through the other normaliser."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    # The tool's test for a comma between digits comes after the commas are gone: it never holds.
    return _map_words(_strip_punctuation(_one_line(text.strip()), has_number_comma=False))


def vqa_accuracy(answer: str, annotations: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy in [0, 1] of one answer against the annotators' answers (VQA evaluator).

    The mean over annotators of min(1, matches among the others / 3)."""
    truths = [_one_line(str(a["answer"])) for a in annotations]
    answer = _one_line(answer)
    # When the annotators are of one mind the strings are compared raw: "Yes" is then not "yes".
    if len(set(truths)) > 1:
        truths = [normalize_vqa(truth) for truth in truths]
        answer = normalize_vqa(answer)
    # "The others" are those whose whole record differs (answer, confidence, id): records that repeat each other
    # word for word all leave together.
    records = [{**a, "answer": truth} for a, truth in zip(annotations, truths)]
    scores = []
    for left_out in records:
        matches = sum(1 for other in records if other["answer"] == answer and other != left_out)
        scores.append(min(1.0, matches / 3))
    return plain_sum(scores) / len(scores)


def m4c_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Accuracy in [0, 1] of one TextVQA answer: always normalised, otherwise the same leave-one-out mean."""
    normal = [normalize_m4c(truth) for truth in truths]
    matches = normal.count(normalize_m4c(answer))
    if matches == 0:
        return 0.0
    # Leaving out one of the matching annotators leaves one match fewer. Summed in the annotators' order.
    scores = [min(1.0, (matches - (truth == normalize_m4c(answer))) / 3) for truth in normal]
    return plain_sum(scores) / len(scores)


def _percent(scores: Sequence[float]) -> float:
    return round(100 * plain_sum(scores) / len(scores), 2)


def score_vqav2(annotations: Sequence[Mapping[str, Any]], answers: Mapping[int, str]) -> dict[str, Any]:
    """The VQA evaluator's report: `overall`, `perQuestionType`, `perAnswerType` and `perQuestion`, in per cent with two
    decimals; and `accuracies` in [0, 1] of the questions in their order. A question without an answer counts as
    answered by nothing."""
    scores: list[float] = []
    by_question: dict[str, list[float]] = {}
    by_answer: dict[str, list[float]] = {}
    per_question: dict[str, float] = {}
    for item in annotations:
        accuracy = vqa_accuracy(answers.get(item["question_id"], ""), item["answers"])
        scores.append(accuracy)
        by_question.setdefault(item["question_type"], []).append(accuracy)
        by_answer.setdefault(item["answer_type"], []).append(accuracy)
        per_question[str(item["question_id"])] = round(100 * accuracy, 2)
    return {
        "overall": _percent(scores),
        "perQuestionType": {name: _percent(values) for name, values in by_question.items()},
        "perAnswerType": {name: _percent(values) for name, values in by_answer.items()},
        "perQuestion": per_question,
        "accuracies": scores,
    }


def score_textvqa(pairs: Sequence[tuple[str, Sequence[str]]]) -> dict[str, Any]:
    """M4C's accuracy over (answer, ten truths), one pair per answered line: the tool's denominator is the number of
    lines in the answer file, so a missing answer is not counted and a doubled one counts twice."""
    scores = [m4c_accuracy(answer, truths) for answer, truths in pairs]
    return {"accuracy": plain_sum(scores) / len(scores), "samples": len(scores), "perLine": scores}
