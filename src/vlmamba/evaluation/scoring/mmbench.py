"""MMBench: which option an answer means, by two published rule versions, and circular evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Rule = Literal["2023-12", "current"]
RULES: tuple[Rule, ...] = ("2023-12", "current")
# Circular copies of question i have the indices i + k x 1e6.
COPY_STRIDE = 1_000_000
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS_2023 = ("Sorry, I can't help with images of people yet.", "I can't process this file.")
_REFUSALS = (*_REFUSALS_2023, "I'm sorry, but without the image provided", "Cannot determine the answer")
# "answer is B" in any case; only A to D, stars around the letter allowed.
_SENTENCE = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_SHORT = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}

# Asked for what the rules leave open: (row, prediction) to the judge's reply, or None when it has none.
AskJudge = Callable[[Mapping[str, Any], str], str | None]


def _letter_2023(answer: str, options: Mapping[str, str]) -> str | None:
    if any(refusal in answer for refusal in _REFUSALS_2023):
        return "E"
    pieces = answer.translate(_MARKS).split()
    # A to E whatever the options are: "E" is an answer (none of them) even to a question with two options, and the
    # article in "A photo of a dog" is option A.
    named = [letter for letter in "ABCDE" if letter in pieces]
    return named[0] if len(named) == 1 else None


def _letter_current(answer: str, options: Mapping[str, str]) -> str | None:
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    pieces = answer.translate(_MARKS).split()
    named = [letter for letter in options if letter in pieces]
    # The *first* place where the letter stands must be among the last four pieces: "B: because B is right" has five.
    if len(named) == 1 and pieces.index(named[0]) > len(pieces) - 5:
        return named[0]
    if not named and "Z" in pieces:
        return "Z"
    match = _SENTENCE.search(answer)
    letter = match.group(1).upper() if match else ""
    return letter if letter in options else None


def infer_option(answer: str, options: Mapping[str, str], rule: Rule = "2023-12") -> str | None:
    """The letter that an answer names by rule; "E" (2023-12) or "Z" (current) for none of them; None when undecided.

    options: letter to text, only those that the question has."""
    if _API_FAILURE not in answer:  # such an "answer" is only looked at for option texts
        letter = (_letter_2023 if rule == "2023-12" else _letter_current)(answer, options)
        if letter:
            return letter
    texts = {letter: str(text).lower() for letter, text in options.items()}
    if rule == "current" and len(answer.lower()) > 2 * sum(len(str(text)) for text in options.values()):
        return None
    # A text that is part of another option's text, or of any word of the answer, counts as found all the same.
    found = [letter for letter, text in texts.items() if text in answer.lower()]
    return found[0] if len(found) == 1 else None


def options_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The options a row has, by letter; empty cells are None."""
    return {letter: row[letter] for letter in "ABCDEFGH" if row.get(letter) is not None}


def _hit(
    copies: Sequence[Mapping[str, Any]],
    inferred: Mapping[int, str | None],
    rule: Rule,
    ask: AskJudge | None,
    undecided: list[int],
) -> int:
    """1 where a question and all its circular copies are right; what nothing decides is added to `undecided`."""
    # First all copies by rule alone: one wrong copy ends the group before any judge is asked.
    if any(inferred[row["index"]] not in (None, row["answer"]) for row in copies):
        return 0
    for row in copies:
        if inferred[row["index"]] is None:
            letter = _judged(row, rule, ask)
            if letter is None:
                undecided.append(row["index"])
            if letter != row["answer"]:
                return 0
    return 1


def _judged(row: Mapping[str, Any], rule: Rule, ask: AskJudge | None) -> str | None:
    if ask is None:
        return None
    for _ in range(3):
        reply = ask(row, row["prediction"])
        letter = infer_option(reply, options_of(row), rule) if reply is not None else None
        if letter:
            return letter
    return None  # the official tool draws a random option here; ours is wrong, and counted


def _mean(hits: Mapping[int, int], rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(hits[row["index"]] for row in rows) / len(rows)


def score_mmbench(rows: Sequence[Mapping[str, Any]], rule: Rule = "2023-12", ask: AskJudge | None = None) -> dict:
    """CircularEval over `rows` (index, answer, prediction, A, B, C, D, category, l2-category), as fractions.

    `acc`: overall, per l2-category (by its official abbreviation where it has one) and per category; `hit`: per
    group; `undecided`: indices that neither rule nor judge decided before their group ended; `vanilla`: accuracy by
    rule alone of first copies and of all rows."""
    if rule not in RULES:
        raise ValueError(f"unknown MMBench rule version {rule!r}: known are {', '.join(RULES)}")
    ordered = sorted(rows, key=lambda row: row["index"])
    inferred = {row["index"]: infer_option(row["prediction"], options_of(row), rule) for row in ordered}
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in ordered:
        groups.setdefault(row["index"] % COPY_STRIDE, []).append(row)
    firsts = [row for row in ordered if row["index"] < COPY_STRIDE]
    undecided: list[int] = []
    hits = {row["index"]: _hit(groups[row["index"]], inferred, rule, ask, undecided) for row in firsts}
    acc: dict[str, float] = {"Overall": _mean(hits, firsts)} if firsts else {"Overall": 0.0}
    for column in ("l2-category", "category"):
        names = sorted({str(row[column]) for row in firsts if row.get(column) is not None})
        for name in names:
            # Version 2023-12 had no abbreviation for coarse perception.
            known = name in _SHORT and (rule == "current" or name != "coarse_perception")
            chosen = [row for row in firsts if str(row.get(column)) == name]
            acc[_SHORT[name] if known and column == "l2-category" else name] = _mean(hits, chosen)
    right = {row["index"]: inferred[row["index"]] == row["answer"] for row in ordered}
    return {
        "acc": acc,
        "hit": {str(index): hit for index, hit in hits.items()},
        "inferred": {str(index): letter for index, letter in inferred.items()},
        "undecided": undecided,
        "vanilla": {
            "first": sum(right[row["index"]] for row in firsts) / len(firsts) if firsts else 0.0,
            "all": sum(right.values()) / len(right) if right else 0.0,
        },
    }
