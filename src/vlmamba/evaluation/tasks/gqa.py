"""GQA, test-dev balanced: compositional questions on real pictures."""

from __future__ import annotations

from pathlib import Path

from vlmamba.evaluation.files import find, image_root, load_json, require, require_table, require_texts, write_json
from vlmamba.evaluation.scoring.gqa import prediction as convert
from vlmamba.evaluation.scoring.gqa import score_gqa
from vlmamba.evaluation.task import SHORT_ANSWER, Example, Joined, Options, Outcome, Prediction, Score, Task


class GQA(Task):
    """A folder as https://cs.stanford.edu/people/dorarad/gqa/download.html gives it:

    testdev_balanced_questions.json (or another tier's)
    testdev_choices.json            optional: gives validity and plausibility, and turns consistency on
    images/n161313.jpg ...
    """

    name = "gqa"
    folders = ("gqa", "GQA")
    files = (
        "testdev_balanced_questions.json",
        "*/testdev_balanced_questions.json",
        "*testdev*questions.json",
        "*_questions.json",
    )
    title = "GQA"
    metric = "accuracy"
    paper = 56.2
    source = "Questions and images are at https://cs.stanford.edu/people/dorarad/gqa/download.html"

    def annotations(self, folder: Path) -> list[str]:
        path = find(folder, *self.files)
        return [f"{self.files[0]} is missing"] if path and "OpenEnded" in path.name else super().annotations(folder)

    def examples(self, folder: Path, variant: str) -> list[Example]:
        path = self.annotation_file(folder)
        questions = require_table(load_json(path), str(path))
        for qid, item in questions.items():
            where = f"{path}, question {qid}"
            require_texts(item, ["question", "answer"], where)
            require(item, ["imageId", "isBalanced", "types", "semantic", "groups", "entailed"], where)
            require_texts(item["types"], ["structural", "semantic", "detailed"], f"{where}, types")
            for step in item["semantic"]:
                require(step, ["operation", "argument"], f"{where}, semantic")
            group = require(item["groups"], ["global"], f"{where}, groups")["global"]
            if not all(isinstance(text, str) for text in ("" if group is None else group, *item["entailed"])):
                raise ValueError(f"{where}: the global group and the entailed questions must be texts")
        first = f"{next(iter(questions.values()))['imageId']}.jpg"
        root = image_root(folder, ["images", "data/images", "."], first)
        return [
            Example(
                id=qid,
                question_id=qid,
                prompt=item["question"] + SHORT_ANSWER,
                image=root / f"{item['imageId']}.jpg",
                target=item["answer"],
                skill=item["types"]["structural"],
                data=item,
            )
            for qid, item in questions.items()
        ]

    @staticmethod
    def _converted(prediction: Prediction) -> str:
        return prediction.text if prediction.verbatim else convert(prediction.text)

    def score(self, joined: Joined, folder: Path, options: Options) -> Score:
        questions = {example.id: example.data for example in joined.examples}
        answers = {qid: self._converted(p) for qid, p in joined.last.items()}
        tier = self.annotation_file(folder).name.split("_")[0]
        choices_file = find(folder, f"{tier}_choices.json", f"*/{tier}_choices.json")
        choices = require_table(load_json(choices_file), str(choices_file)) if choices_file else None
        lacking = [
            qid for qid, q in questions.items() if choices is not None and q["isBalanced"] and qid not in choices
        ]
        if lacking:
            raise ValueError(f"{choices_file} has no choices for {len(lacking)} questions, such as {lacking[0]}")
        for qid, entry in (choices or {}).items():
            for name in ("valid", "plausible"):
                if not isinstance(require(entry, ["valid", "plausible"], f"{choices_file}, {qid}")[name], list):
                    raise ValueError(f"{choices_file}, {qid}: expected a list as {name}, found {entry[name]!r}")
        # The tiers that come with choices are those whose entailed questions are in the file; the test-dev file
        # names questions that it does not hold.
        metrics = score_gqa(questions, answers, choices, consistency=choices is not None)
        outcomes = {
            qid: Outcome(float(answers.get(qid) == q["answer"]), answers.get(qid, ""))
            for qid, q in questions.items()
            if q["isBalanced"]
        }
        notes = []
        if choices is None:
            notes.append("no choices file: validity and plausibility are 0, as in the official script")
            notes.append("consistency was not computed and stands at 0, as in the official script")
        return Score(metrics["accuracy"], metrics, outcomes, notes)

    def write_submission(self, joined: Joined, folder: Path, out: Path) -> Path | None:
        """`gqa_predictions.json`: [{questionId, prediction}], for the official script and the server."""
        rows = [{"questionId": qid, "prediction": self._converted(p)} for qid, p in joined.last.items()]
        return write_json(out / "gqa_predictions.json", rows)
