"""POPE: is an object in the picture? Three splits differ in how the absent objects were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.evaluation.files import find, image_root, load_json_lines, require
from vlmamba.evaluation.scoring.pope import parse, score_pope
from vlmamba.evaluation.task import SHORT_ANSWER, Example, Joined, Options, Outcome, Prediction, Score, Task

# LLaVA's question file numbers the splits in this order, each from a new ten million.
SPLITS = ("adversarial", "random", "popular")
_LLAVA_STRIDE = 10_000_000


class POPE(Task):
    """A folder as https://github.com/AoiDragon/POPE (output/coco) gives it, with COCO's val2014 pictures:

    coco_pope_adversarial.json      JSON lines, or all three in a folder coco/
    coco_pope_random.json           2910 lines in the release that LLaVA's numbers use, 3000 in the newer one
    coco_pope_popular.json
    val2014/COCO_val2014_000000310196.jpg ...
    """

    name = "pope"
    folders = ("pope", "POPE")
    title = "POPE"
    version = 2
    metric = "mean F1"
    paper = 84.4
    source = (
        "The three files are at https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/"
        "output/coco, the pictures at http://images.cocodataset.org/zips/val2014.zip"
    )

    def _file(self, folder: Path, split: str) -> Path | None:
        name = f"coco_pope_{split}.json"
        return find(folder, name, f"coco/{name}", f"output/coco/{name}")

    def annotations(self, folder: Path) -> list[str]:
        return [f"coco_pope_{split}.json is missing" for split in SPLITS if not self._file(folder, split)]

    def examples(self, folder: Path, variant: str) -> list[Example]:
        self.require_folder(folder)
        examples: list[Example] = []
        for number, split in enumerate(SPLITS):
            path = self._file(folder, split)
            assert path is not None
            lines = load_json_lines(path)
            if not lines:
                raise ValueError(f"{path} is empty")
            for line in lines:
                require(line, ["question_id", "image", "text", "label"], str(path))
            root = image_root(folder, ["val2014", "images", "."], lines[0]["image"])
            examples += [self._example(line, split, number, root) for line in lines]
        return examples

    def _example(self, line: Any, split: str, number: int, root: Path) -> Example:
        return Example(
            id=f"{split}/{line['question_id']}",
            question_id=int(line["question_id"]) + number * _LLAVA_STRIDE,
            prompt=line["text"] + SHORT_ANSWER,
            image=root / line["image"],
            target=line["label"],
            skill=split,
            data={"question": line["text"], "label": line["label"], "split": split},
        )

    def index(self, examples: Sequence[Example]) -> Mapping[Any, Example]:
        return {e.id: e for e in examples} | {str(e.question_id): e for e in examples}

    def locate(self, prediction: Prediction, index: Mapping[Any, Example]) -> str | None:
        split = prediction.fields.get("category", prediction.fields.get("split"))
        # Each official file counts from 1: with a split named beside it, an id without LLaVA's offset is enough.
        key = f"{split}/{prediction.question_id}" if split is not None else str(prediction.question_id)
        example = index.get(key) or index.get(str(prediction.question_id))
        return example.id if example is not None else None

    def answers_in(self, path: Path) -> list[Prediction] | None:
        """A folder with one file per split, its name holding the split's, in the authors' format: JSON lines
        {question, answer} in the order of the questions."""
        if not path.is_dir():
            return None
        predictions: list[Prediction] = []
        for split in SPLITS:
            file = find(path, f"*{split}*.json*")
            if file is None:
                raise ValueError(f"{path} has no answers to the {split} split: expected a file with it in its name")
            for i, line in enumerate(load_json_lines(file), 1):
                require(line, ["answer"], f"{file}, line {i}")
                qid = line.get("question_id", i)
                predictions.append(Prediction(qid, str(line["answer"]), fields={"split": split}, verbatim=True))
        return predictions

    def score(self, joined: Joined, folder: Path, options: Options) -> Score:
        answers = joined.last
        splits: dict[str, list[tuple[str, str]]] = {}
        outcomes = {}
        for example in joined.examples:
            prediction = answers.get(example.id)
            if prediction is None:
                continue
            # Each answer meets the label of its own question. The tools pair line by line instead, and a missing
            # line would shift all that follow.
            label = example.data["label"]
            splits.setdefault(example.data["split"], []).append((prediction.text, label))
            parsed = parse(prediction.text)
            outcomes[example.id] = Outcome(float((parsed == "no") == (label == "no")), parsed)
        metrics = score_pope(splits)
        notes = []
        if joined.coverage()["missing"]:
            notes.append("questions without an answer are not counted: an answer says yes or no, nothing says neither")
        if unanswered := ", ".join(split for split in SPLITS if split not in splits):
            notes.append(f"no answer to {unanswered}: the means are without")
        return Score(100 * metrics["mean_f1"], metrics, outcomes, notes)
