"""VQAv2: validation is scored here, test-dev by the challenge's server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmamba.evaluation.files import find, image_root, load_json, require, require_list, require_texts, write_json
from vlmamba.evaluation.scoring.vqa import normalize_m4c, score_vqav2
from vlmamba.evaluation.task import SHORT_ANSWER, Example, Joined, Options, Outcome, Score, Task


class VQAv2(Task):
    """A folder as https://visualqa.org/download.html and http://images.cocodataset.org give it, either

        v2_OpenEnded_mscoco_test-dev2015_questions.json     to be scored by the server
        v2_OpenEnded_mscoco_test2015_questions.json         optional: the ids that a submission must cover
        test2015/COCO_test2015_000000000001.jpg ...

    or, scored here,

        v2_OpenEnded_mscoco_val2014_questions.json
        v2_mscoco_val2014_annotations.json
        val2014/COCO_val2014_000000000042.jpg ...

    The names of the files tell which. Where both are there the variant tells them apart: `llava` asks and scores
    validation, `llava-test-dev` asks test-dev.
    """

    name = "vqav2"
    folders = ("vqav2", "VQAv2")
    title = "VQAv2"
    metric = "accuracy"
    paper = 76.6
    variants = ("llava", "llava-test-dev")
    source = "Questions, annotations and images are at https://visualqa.org/download.html"

    def _files(self, folder: Path, variant: str = "llava") -> tuple[Path | None, str, Path | None]:
        """Questions, the split in the names of their pictures, and annotations, which a test set has none of."""
        test = ("*test-dev*questions.json", "*test*questions.json")
        patterns = test if variant == "llava-test-dev" else ("*val*questions.json", *test, "*questions.json")
        questions = find(folder, *patterns)
        name = questions.name if questions else ""
        split = "test2015" if "test" in name else "train2014" if "train" in name else "val2014"
        return questions, split, None if "test" in name else find(folder, f"*{split}_annotations.json")

    def annotations(self, folder: Path) -> list[str]:
        questions, split, annotations = self._files(folder)
        if questions is None:
            return ["v2_OpenEnded_mscoco_test-dev2015_questions.json (or val2014's) is missing"]
        lacking = split != "test2015" and annotations is None
        return [f"v2_mscoco_{split}_annotations.json, for {questions.name}, is missing"] if lacking else []

    def examples(self, folder: Path, variant: str) -> list[Example]:
        self.require_folder(folder)
        questions_file, split, annotations_file = self._files(folder, variant)
        if questions_file is None:
            raise ValueError(f"{folder} has no questions for the variant {variant}: {self.source}")
        truths: dict[Any, Any] = {}
        if annotations_file is not None:
            top = require(load_json(annotations_file), ["annotations"], str(annotations_file))
            for item in require_list(top["annotations"], f"{annotations_file}, annotations"):
                require(item, ["question_id", "answers"], str(annotations_file))
                where = f"{annotations_file}, question {item['question_id']}"
                require_texts(item, ["question_type", "answer_type"], where)
                require_list(item["answers"], f"{where}, answers")
                truths[item["question_id"]] = item
        top = require(load_json(questions_file), ["questions"], str(questions_file))
        questions = require_list(top["questions"], f"{questions_file}, questions")
        for item in questions:
            require(item, ["question_id", "image_id", "question"], str(questions_file))
        unanswered = [item["question_id"] for item in questions if truths and item["question_id"] not in truths]
        if unanswered:
            raise ValueError(
                f"{annotations_file} has no answers to {len(unanswered)} questions, such as {unanswered[0]}"
            )
        first = f"COCO_{split}_{questions[0]['image_id']:012d}.jpg"
        root = image_root(folder, [split, "images", "."], first)
        # The evaluator sums in the order of the annotations.
        place = {qid: number for number, qid in enumerate(truths)}
        questions = sorted(questions, key=lambda item: place.get(item["question_id"], 0))
        return [self._example(item, truths.get(item["question_id"]), root, split) for item in questions]

    def _example(self, item: Any, truth: Any, root: Path, split: str) -> Example:
        answers = [answer["answer"] for answer in truth["answers"]] if truth else []
        return Example(
            id=str(item["question_id"]),
            question_id=item["question_id"],
            prompt=item["question"] + SHORT_ANSWER,
            image=root / f"COCO_{split}_{item['image_id']:012d}.jpg",
            target=", ".join(dict.fromkeys(answers)),
            skill=truth["answer_type"] if truth else "unscored",
            data={"question": item["question"], "truth": truth},
        )

    def score(self, joined: Joined, folder: Path, options: Options) -> Score:
        if joined.examples[0].data["truth"] is None:
            outcomes = {e.id: Outcome(None, normalize_m4c(p.text)) for e, p in joined.pairs}
            return Score(None, {}, outcomes, ["test-dev has no public answers: submit the file to the VQA server"])
        annotations = [example.data["truth"] for example in joined.examples]
        as_is = {e.question_id: p.text for e, p in joined.pairs}
        # LLaVA sends each answer through TextVQA's normaliser before it submits it; "mother's" can then never match.
        submitted = {qid: normalize_m4c(text) for qid, text in as_is.items()}
        reports = {
            "official_on_raw_results": score_vqav2(annotations, as_is),
            "official_on_llava_submission": score_vqav2(annotations, submitted),
        }
        accuracies = {name: report.pop("accuracies") for name, report in reports.items()}
        # A file in the challenge's own format is scored as it stands; an answer file as LLaVA would submit it.
        verbatim = all(p.verbatim for p in joined.last.values())
        chosen, final = ("raw_results", as_is) if verbatim else ("llava_submission", submitted)
        report = reports[f"official_on_{chosen}"]
        outcomes = {
            e.id: Outcome(accuracy, final.get(e.question_id, ""))
            for e, accuracy in zip(joined.examples, accuracies[f"official_on_{chosen}"])
        }
        metrics = {**{k: v for k, v in report.items() if k != "perQuestion"}, "scored": f"official_on_{chosen}"}
        return Score(report["overall"], {**metrics, **reports}, outcomes)

    def write_submission(self, joined: Joined, folder: Path, out: Path) -> Path | None:
        """`vqav2_submission.json`: [{question_id, answer}] over all test2015 ids, "" where nothing was asked; of
        validation, over its own."""
        scored = joined.examples[0].data["truth"] is not None
        everything = None if scored else find(folder, "*mscoco_test2015_questions.json")
        ids = (
            [item["question_id"] for item in load_json(everything)["questions"]]
            if everything is not None
            else [example.question_id for example in joined.examples]
        )
        answers = {e.question_id: p.text if p.verbatim else normalize_m4c(p.text) for e, p in joined.pairs}
        rows = [{"question_id": qid, "answer": answers.get(qid, "")} for qid in ids]
        return write_json(out / "vqav2_submission.json", rows)
