"""A user's own questions: LLaVA-style JSON, scored by a metric of choice."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vlmamba.evaluation.files import load_json, load_json_lines, require, require_list
from vlmamba.evaluation.scoring.mmbench import infer_option
from vlmamba.evaluation.scoring.vqa import m4c_accuracy, normalize_m4c
from vlmamba.evaluation.task import Example, Joined, Options, Outcome, Score, Task, mean_score

Metric = Literal["exact", "contains", "vqa", "anls", "choice"]

_OPTION = re.compile(r"^\s*\(?([A-H])[.):]\s*(.+?)\s*$", re.MULTILINE)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def _words(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


def _distance(a: str, b: str) -> int:
    """Levenshtein's."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (letter != other))
    return row[-1]


def exact(answer: str, truths: Sequence[str], prompt: str) -> float:
    """1 where the answer is one of the truths, but for case, blanks and a final period."""
    return float(_plain(answer) in map(_plain, truths))


def contains(answer: str, truths: Sequence[str], prompt: str) -> float:
    """1 where one of the truths stands in the answer, as whole words."""
    words = _words(answer)
    return float(any(_words(truth) in words for truth in truths))


def vqa(answer: str, truths: Sequence[str], prompt: str) -> float:
    """VQA accuracy with TextVQA's normaliser; with fewer than four truths, of which leaving one out leaves too few for
    a 1, whether one of them is matched."""
    if len(truths) < 4:
        return float(normalize_m4c(answer) in map(normalize_m4c, truths))
    return m4c_accuracy(answer, truths)


def anls(answer: str, truths: Sequence[str], prompt: str) -> float:
    """Average normalised Levenshtein similarity (DocVQA): 1 - distance / longer length, 0 below a half.

    Case and runs of blanks make no distance, but lengths are of the whole texts in capitals, as in DocVQA's script."""
    best = 0.0
    for truth in truths:
        longer = max(len(answer.upper()), len(truth.upper()))
        distance = _distance(*(" ".join(text.lower().split()) for text in (answer, truth)))
        best = max(best, 1 - distance / longer if longer else 1.0)
    return best if best >= 0.5 else 0.0


def choice(answer: str, truths: Sequence[str], prompt: str) -> float:
    """1 where the option that the answer means (MMBench's current rule) is the true one, named by letter or by text.

    Options are the prompt's lines "A. text", "(A) text"."""
    options = dict(_OPTION.findall(prompt))
    meant = infer_option(answer, options, "current")
    true = {truth.strip().rstrip(".").strip("()") for truth in truths} | {
        infer_option(t, options, "current") for t in truths
    }
    return float(meant is not None and meant != "Z" and meant in true)


METRICS: dict[str, Callable[[str, Sequence[str], str], float]] = {
    "exact": exact,
    "contains": contains,
    "vqa": vqa,
    "anls": anls,
    "choice": choice,
}


class OwnData(Task):
    """A JSON (or JSON-lines) file in LLaVA's layout, pictures relative to it or to `images`:

        [{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                         {"from": "gpt", "value": "a fork"}]}, ...]

    The first answer is the truth; a field "answers": [...] beside it gives several. A field "skill" groups questions.
    Where a conversation has more turns, only the first is asked.
    """

    name = "own"
    title = "own data"
    version = 2
    source = "See the layout in the documentation of OwnData"
    metric = "exact"

    def __init__(self, metric: Metric = "exact", images: Path | None = None, max_new_tokens: int = 128) -> None:
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}: there are {', '.join(METRICS)}")
        self.metric = metric
        self.max_new_tokens = max_new_tokens
        self._images = images

    def image_folder(self) -> Path | None:
        return self._images

    def annotations(self, folder: Path) -> list[str]:
        return [] if folder.is_file() else [f"there is no file {folder}"]

    def require_folder(self, folder: Path) -> None:
        if not folder.is_file():
            raise ValueError(f"own data is a JSON file in LLaVA's layout: there is no file {folder}")

    def require_pictures(self, folder: Path) -> None:
        """ValueError if one is not there: to be said before a model is loaded."""
        for example in self.examples(folder, ""):
            if isinstance(example.image, Path) and not example.image.is_file():
                raise ValueError(
                    f"{folder}: sample {example.id!r} has no picture at {example.image}; --images names the folder "
                    "where they are, the file's own if it is not given"
                )

    def examples(self, folder: Path, variant: str) -> list[Example]:
        self.require_folder(folder)
        records = load_json_lines(folder) if folder.suffix == ".jsonl" else load_json(folder)
        root = folder.parent if self._images is None else self._images
        examples: list[Example] = []
        seen: set[str] = set()
        for number, record in enumerate(require_list(records, str(folder)), 1):
            example = self._example(record, root, f"{folder}, entry {number}")
            if example.id in seen:
                raise ValueError(f"{folder}, entry {number}: the id {example.id!r} occurs a second time")
            seen.add(example.id)
            examples.append(example)
        return examples

    def _example(self, record: Any, root: Path, where: str) -> Example:
        turns = require(record, ["id", "conversations"], where)["conversations"]
        speakers = [turn.get("from") for turn in turns[:2]] if isinstance(turns, list) else []
        if speakers[:1] != ["human"] or (speakers != ["human", "gpt"] and "answers" not in record):
            raise ValueError(f"{where}: expected a human turn and its answer by gpt, found turns by {speakers}")
        truths = record.get("answers")
        if not isinstance(truths, str | list | None):
            raise ValueError(f"{where}: the answers must be a list, found {truths!r}")
        truths = [truths] if isinstance(truths, str) else truths or [turns[1]["value"]]
        question = turns[0]["value"].replace("<image>", "").strip()
        return Example(
            id=str(record["id"]),
            question_id=record["id"],
            prompt=question,
            image=root / record["image"] if record.get("image") else None,
            target=", ".join(dict.fromkeys(map(str, truths))),
            skill=str(record.get("skill", "all")),
            data={"question": question, "truths": [str(truth) for truth in truths], "turns": len(turns)},
        )

    def score(self, joined: Joined, folder: Path, options: Options) -> Score:
        answers, outcomes = joined.last, {}
        skills: dict[str, dict[str, Outcome]] = {}
        for example in joined.examples:
            text = answers[example.id].text if example.id in answers else ""
            value = METRICS[self.metric](text, example.data["truths"], example.prompt)
            outcomes[example.id] = Outcome(value if example.id in answers else 0.0, text)
            skills.setdefault(example.skill, {})[example.id] = outcomes[example.id]
        by_skill: Mapping[str, float] = {name: 100 * mean_score(part) for name, part in skills.items()}
        headline = 100 * mean_score(outcomes)
        longer = sum(example.data["turns"] > 2 for example in joined.examples)
        notes = [f"{longer} conversations have more turns: only their first question was asked"] if longer else []
        return Score(headline, {self.metric: headline, "bySkill": by_skill}, outcomes, notes)
