"""MM-Vet: open answers on integrated capabilities, graded by a judge model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmamba.evaluation.files import image_root, load_json, require_list, require_table, require_texts, write_json
from vlmamba.evaluation.scoring.mmvet import grade, judge_prompt, score_mmvet
from vlmamba.evaluation.task import Example, Joined, Options, Outcome, Prediction, Score, Task

# Our own wording: the official few-shot text belongs to its authors. Grades given with it are not comparable.
OWN_FEW_SHOT = """\
You grade answers. Each row holds a question, the true answer, a model's answer and a grade from 0.0 (wrong) to 1.0
(right) in steps of 0.1. Where the true answer joins parts with <AND>, all of them must be said for 1.0, and some earn
a part of it. Where it joins them with <OR>, any one is enough. Extra words do no harm unless they are false. Write the
missing grade of the last row and nothing else.

question | true answer | model's answer | grade
--- | --- | --- | ---
Which fruits are on the plate? | pear <AND> plum | A plum. | 0.5
Which fruits are on the plate? | pear <AND> plum | There are a plum and a pear. | 1.0
What is the sum on the receipt? | 12 <OR> twelve | It is 21. | 0.0
What is the sum on the receipt? | 12 <OR> twelve | twelve euros | 1.0
"""


class MMVet(Task):
    """A folder as https://github.com/yuweihao/MM-Vet (mm-vet.zip) gives it:

    mm-vet.json
    images/v1_0.png ...
    """

    name = "mmvet"
    folders = ("mmvet", "mm-vet", "MM-Vet")
    files = ("mm-vet.json", "mm-vet/mm-vet.json")
    title = "MM-Vet"
    version = 2
    metric = "total"
    paper = 32.6
    max_new_tokens = 1024
    source = "mm-vet.zip is at https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"

    def examples(self, folder: Path, variant: str) -> list[Example]:
        path = self.annotation_file(folder)
        table = require_table(load_json(path), str(path))
        for qid, item in table.items():
            require_texts(item, ["imagename", "question", "answer"], f"{path}, {qid}")
            require_list(item.get("capability"), f"{path}, {qid}, capability")
        first = next(iter(table.values()))["imagename"]
        root = image_root(path.parent, ["images", "."], first)
        return [
            Example(
                id=qid,
                question_id=qid,
                prompt=item["question"],
                image=root / item["imagename"],
                target=item["answer"],
                skill="+".join(sorted(item["capability"])),
                data=item,
            )
            for qid, item in table.items()
        ]

    def locate(self, prediction: Prediction, index: Mapping[Any, Example]) -> str | None:
        key = str(prediction.question_id)
        return next((k for k in (key, f"v1_{key}") if k in index), None)  # LLaVA's answer files count without v1_

    @staticmethod
    def _judge_prompt(example: Example, prediction: Prediction, options: Options) -> str:
        few_shot = OWN_FEW_SHOT if options.few_shot is None else options.few_shot
        return judge_prompt(few_shot, example.data["question"], example.data["answer"], prediction.text)

    def judge_prompts(self, joined: Joined, options: Options) -> tuple[list[str], int]:
        answers = joined.last
        prompts = [self._judge_prompt(e, answers[e.id], options) for e in joined.examples if e.id in answers]
        return prompts * options.runs, 3

    def score(self, joined: Joined, folder: Path, options: Options) -> Score:
        if options.judge is None:
            outcomes = {e.id: Outcome(None, "not judged") for e in joined.examples}
            note = (
                "not judged: MM-Vet needs a judge model; name an endpoint, or give the result file to the authors' tool"
            )
            return Score(None, {}, outcomes, [note])
        answers = joined.last
        grades: dict[str, list[float]] = {}
        ask = options.judge.ask
        for run in range(options.runs):
            for example in joined.examples:
                if example.id not in answers:
                    grades.setdefault(example.id, []).append(0.0)
                    continue
                prompt = self._judge_prompt(example, answers[example.id], options)
                asked: dict[tuple[str, float], int] = {}

                def reply(text: str, temperature: float, asked: dict = asked, run: int = run) -> str:
                    # The same words at the same temperature twice: a repeat, which must not meet the first's cache.
                    turn = asked[text, temperature] = asked.get((text, temperature), -1) + 1
                    return ask(text, temperature=temperature, max_tokens=3, sample=(run, turn))

                grades.setdefault(example.id, []).append(grade(prompt, reply)[0])
        metrics = score_mmvet({e.id: e.data for e in joined.examples}, grades)
        outcomes = {qid: Outcome(sum(v) / len(v), "/".join(map(str, v))) for qid, v in grades.items()}
        notes = [f"judged by {options.judge.model}"]
        if options.few_shot is None:
            notes.append("graded with our own few-shot text: not comparable with published MM-Vet numbers")
        return Score(metrics["total"], metrics | {"grades": grades}, outcomes, notes)

    def write_submission(self, joined: Joined, folder: Path, out: Path) -> Path | None:
        """`mmvet_result.json`: {"v1_0": text, ...}, what the authors' evaluator reads."""
        answers = joined.last
        table = {e.id: answers[e.id].text if e.id in answers else "" for e in joined.examples}
        return write_json(out / "mmvet_result.json", table)
