"""ScienceQA: school questions with options, half of them with a picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vlmamba.evaluation.files import find, load_json, require, require_table, require_texts
from vlmamba.evaluation.scoring.scienceqa import OPTIONS, score_scienceqa
from vlmamba.evaluation.task import OPTION_LETTER, Example, Joined, Options, Outcome, Prediction, Score, Task


class ScienceQA(Task):
    """A folder as https://github.com/lupantech/ScienceQA gives it:

        problems.json
        pid_splits.json
        images/test/<id>/image.png

    The whole test split is asked, as LLaVA does; the headline is the accuracy on problems with a picture.
    """

    name = "scienceqa"
    folders = ("scienceqa", "ScienceQA", "sqa")
    title = "ScienceQA-IMG"
    metric = "IMG accuracy"
    paper = 65.4
    max_new_tokens = 1024
    source = "problems.json, pid_splits.json and images/test are at https://github.com/lupantech/ScienceQA"

    def annotations(self, folder: Path) -> list[str]:
        return [f"{name} is missing" for name in ("problems.json", "pid_splits.json") if not find(folder, name)]

    def examples(self, folder: Path, variant: str) -> list[Example]:
        self.require_folder(folder)
        path, splits_path = folder / "problems.json", folder / "pid_splits.json"
        problems = require_table(load_json(path), str(path))
        ids = require(load_json(splits_path), ["test"], str(splits_path))["test"]
        examples = []
        for pid in ids:
            if pid not in problems:
                raise ValueError(f"{path} has no problem {pid!r}, which {splits_path.name} puts in the test split")
            problem = require(problems[pid], ["choices", "answer", "hint", "image"], f"{path}, problem {pid}")
            require_texts(problem, ["question", "grade", "subject", "topic"], f"{path}, problem {pid}")
            if not isinstance(problem["choices"], list) or not problem["choices"]:
                raise ValueError(f"{path}, problem {pid}: expected a list of choices, found {problem['choices']!r}")
            examples.append(self._example(pid, problem, folder))
        if not examples:
            raise ValueError(f"{splits_path} has an empty test split")
        return examples

    def _example(self, pid: str, problem: Any, folder: Path) -> Example:
        context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
        options = [f"{letter}. {text}" for letter, text in zip(OPTIONS, problem["choices"])]
        image = folder / "images" / "test" / pid / problem["image"] if problem["image"] else None
        return Example(
            id=pid,
            question_id=pid,
            prompt="\n".join([context + problem["question"], *options]) + OPTION_LETTER,
            image=image,
            target=OPTIONS[problem["answer"]],
            skill=problem["subject"],
            data=problem,
        )

    def logged_prompt(self, example: Example) -> str:
        return ("" if example.image is None else "<image>\n") + example.prompt

    def answers_in(self, path: Path) -> list[Prediction] | None:
        """The authors' result file, {"results": {id: index}}; with "outputs" beside it the texts are read instead."""
        if path.suffix != ".json":
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return None  # JSON lines under another name
        if not isinstance(value, dict) or "outputs" in value or not isinstance(value.get("results"), dict):
            return None
        for pid, index in value["results"].items():
            if isinstance(index, bool) or not re.fullmatch(r"-?\d+", str(index)):
                raise ValueError(f"{path}: results[{pid!r}] is {index!r}; expected the number of an option, from 0")
        return [
            Prediction(pid, OPTIONS[int(i)] if 0 <= int(i) < len(OPTIONS) else "FAILED", verbatim=True)
            for pid, i in value["results"].items()
        ]

    @staticmethod
    def _has_image(example: Example, prediction: Prediction) -> bool:
        # LLaVA asks whether the prompt held a picture; a file without prompts leaves only the problem to ask.
        if prediction.prompt is None:
            return example.image is not None
        return "<image>" in prediction.prompt

    def score(self, joined: Joined, folder: Path, options: Options) -> Score:
        problems = {example.id: example.data for example in joined.examples}
        answers = {e.id: (p.text, self._has_image(e, p)) for e, p in joined.pairs}
        metrics = score_scienceqa(problems, answers)
        outcomes = {pid: Outcome(float(q["correct"]), q["parsed"]) for pid, q in metrics["perQuestion"].items()}
        notes = []
        if joined.coverage()["missing"]:
            notes.append("missing answers are wrong, but LLaVA's script does not count them among those with a picture")
        return Score(metrics["img_acc"], metrics, outcomes, notes)
