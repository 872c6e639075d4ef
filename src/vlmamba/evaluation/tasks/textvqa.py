"""TextVQA, validation: reading text in photographs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.evaluation.files import find, image_root, load_json, load_json_lines, require, require_list
from vlmamba.evaluation.scoring.vqa import normalize_m4c, score_textvqa
from vlmamba.evaluation.task import SHORT_ANSWER, Example, Joined, Options, Outcome, Prediction, Score, Task

_OCR_LINE = "Reference OCR token: "
_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def question_of(prompt: str) -> str | None:
    """The question in one of LLaVA's TextVQA prompts, in lower case; None where the prompt is none of them."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = _OLD_PROMPT.search(prompt)
        return match.group(1).lower() if match else None
    if _OCR_LINE in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_OCR_LINE.strip()) else 0].lower()
    return lines[0].lower() if len(lines) == 2 else None


class TextVQA(Task):
    """A folder as https://textvqa.org/dataset gives it:

        TextVQA_0.5.1_val.json
        TextVQA_Rosetta_OCR_v0.2_val.json       OCR tokens, for the prompts that name them; or, instead,
        llava_textvqa_val_v051_ocr.jsonl        LLaVA's question file, which holds the finished OCR line
        train_images/0054c91397f2fe05.jpg ...

    Variants: `ocr-after` is LLaVA's prompt (tokens between question and instruction), `ocr-before` puts the line first,
    which suits a model that reads left to right only, `no-ocr` leaves it out.
    """

    name = "textvqa"
    folders = ("textvqa", "TextVQA")
    files = ("TextVQA_0.5.1_val.json", "TextVQA*_val.json")
    title = "TextVQA"
    version = 2
    metric = "accuracy"
    paper = 48.9
    variants = ("ocr-after", "ocr-before", "no-ocr")
    scoring_variant = "no-ocr"
    source = "Annotations, Rosetta OCR tokens and images (train_val_images.zip) are at https://textvqa.org/dataset"

    def _ocr(self, folder: Path) -> Mapping[Any, str] | None:
        """Tokens as they stand in the prompt, by image id or by (image id, question); None without a file."""
        rosetta = find(folder, "TextVQA_Rosetta_OCR*_val.json")
        if rosetta is not None:
            items = require_list(require(load_json(rosetta), ["data"], str(rosetta))["data"], f"{rosetta}, data")
            return {
                item["image_id"]: ", ".join(item["ocr_tokens"])
                for item in (require(item, ["image_id", "ocr_tokens"], str(rosetta)) for item in items)
            }
        prompts = find(folder, "llava_textvqa_val*ocr.jsonl")
        if prompts is None:
            return None
        table = {}
        for line in load_json_lines(prompts):
            require(line, ["question_id", "text"], str(prompts))
            tokens = line["text"].partition(_OCR_LINE)[2].split("\n")[0]
            table[line["question_id"], question_of(line["text"])] = tokens
        return table

    def examples(self, folder: Path, variant: str) -> list[Example]:
        path = self.annotation_file(folder)
        items = require_list(require(load_json(path), ["data"], str(path))["data"], f"{path}, data")
        for item in items:
            require(item, ["question_id", "question", "image_id", "answers"], str(path))
            if not isinstance(item["answers"], list) or len(item["answers"]) != 10:
                raise ValueError(f"{path}, question {item['question_id']}: expected ten answers")
        ocr: Mapping[Any, str] = {}
        if variant != "no-ocr" and not all("ocr_tokens" in item for item in items):
            found = self._ocr(folder)
            if found is None:
                raise ValueError(
                    f"the prompt variant {variant} names OCR tokens, and {folder} has none: get "
                    "TextVQA_Rosetta_OCR_v0.2_val.json at https://textvqa.org/dataset, or use the variant no-ocr"
                )
            ocr = found
        root = image_root(folder, ["train_images", "images", "."], f"{items[0]['image_id']}.jpg")
        return [self._example(item, ocr, root, variant) for item in items]

    def _example(self, item: Any, ocr: Mapping[Any, str], root: Path, variant: str) -> Example:
        question, image = item["question"], item["image_id"]
        tokens = (
            ", ".join(item["ocr_tokens"])
            if "ocr_tokens" in item
            else ocr.get(image, ocr.get((image, question.lower()), ""))
        )
        # The line stays when the picture has no token.
        prompt = {
            "ocr-after": f"{question}\n{_OCR_LINE}{tokens}",
            "ocr-before": f"{_OCR_LINE}{tokens}\n{question}",
            "no-ocr": question,
        }[variant]
        return Example(
            id=str(item["question_id"]),
            question_id=image,  # LLaVA's answer files name the image and tell questions apart by their prompt
            prompt=prompt + SHORT_ANSWER,
            image=root / f"{image}.jpg",
            target=", ".join(dict.fromkeys(item["answers"])),
            skill="text",
            data={"question": question, "answers": item["answers"], "image_id": image},
        )

    def index(self, examples: Sequence[Example]) -> Mapping[Any, Example]:
        table: dict[Any, Example] = {example.id: example for example in examples}
        # Two annotations with the same picture and question: the last one answers for both, as in LLaVA's script.
        return table | {self._key(e): e for e in examples}

    @staticmethod
    def _key(example: Example) -> tuple[Any, str]:
        return example.data["image_id"], example.data["question"].lower()

    def locate(self, prediction: Prediction, index: Mapping[Any, Example]) -> str | None:
        if prediction.prompt is not None:
            example = index.get((prediction.question_id, question_of(prediction.prompt)))
            if example is not None:
                return example.id
        return super().locate(prediction, index)

    def score(self, joined: Joined, folder: Path, options: Options) -> Score:
        truths = {self._key(e): e.data["answers"] for e in joined.examples}
        report = score_textvqa([(p.text, truths[self._key(e)]) for e, p in joined.pairs])
        outcomes = {
            e.id: Outcome(value, normalize_m4c(p.text)) for (e, p), value in zip(joined.pairs, report.pop("perLine"))
        }
        notes = []
        if joined.coverage()["missing"]:
            notes.append("the official denominator is the number of answers: questions without one are not counted")
        return Score(100 * report["accuracy"], report, outcomes, notes)
