"""MME: fourteen sub-tasks of yes-or-no questions, two per picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmamba.evaluation.files import find, load_text, write_atomically
from vlmamba.evaluation.scoring.mme import TASKS, on_one_line, parse, score_mme
from vlmamba.evaluation.task import SHORT_ANSWER, Example, Joined, Options, Outcome, Prediction, Score, Task

NAMES = tuple(name for names in TASKS.values() for name in names)
# One blank before it in most questions, two in seven of them.
_OFFICIAL_PHRASE = re.compile(r"\s*Please answer yes or no\.\s*$")
_IMAGE_TYPES = (".jpg", ".png", ".jpeg")


def _bare(question: str) -> str:
    """A question without LLaVA's or the official instruction."""
    question = question.replace(SHORT_ANSWER.strip(), "").strip()
    return _OFFICIAL_PHRASE.sub("", question)


class MME(Task):
    """A folder as https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (Evaluation) gives it, itself or
    in a folder MME_Benchmark_release_version:

        existence/000000006040.txt          two lines: question, tab, Yes or No
        existence/000000006040.jpg
        ...                                 count, position, color, OCR and the four of cognition are like this
        posters/questions_answers_YN/*.txt  posters, celebrity, scene, landmark, artwork keep them apart
        posters/images/*.jpg
    """

    name = "mme"
    folders = ("mme", "MME")
    title = "MME"
    metric = "perception"
    paper = 1369.6
    source = (
        "Ask for MME_Benchmark_release_version as described at "
        "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
    )

    def _root(self, folder: Path) -> Path:
        return find(folder, "MME_Benchmark_release_version*") or folder

    def annotations(self, folder: Path) -> list[str]:
        root = self._root(folder)
        return [f"the sub-task {name} is missing" for name in NAMES if not list(self._texts(root, name))]

    @staticmethod
    def _texts(root: Path, name: str) -> Iterator[Path]:
        apart = root / name / "questions_answers_YN"
        yield from sorted((apart if apart.is_dir() else root / name).glob("*.txt"))

    def examples(self, folder: Path, variant: str) -> list[Example]:
        self.require_folder(folder)
        root = self._root(folder)
        return [e for name in NAMES for path in self._texts(root, name) for e in self._of_image(root, name, path)]

    def _of_image(self, root: Path, name: str, path: Path) -> list[Example]:
        images = root / name / "images" if (root / name / "images").is_dir() else root / name
        image = next((p for p in (images / (path.stem + t) for t in _IMAGE_TYPES) if p.exists()), images / path.stem)
        lines = [line.strip() for line in load_text(path).split("\n") if line.strip()]
        examples = []
        for number, line in enumerate(lines):
            question, tab, gold = line.partition("\t")
            if not tab or gold.lower() not in ("yes", "no"):
                raise ValueError(f"{path}, line {number + 1}: expected a question, a tab and Yes or No, found {line!r}")
            suffix = image.suffix or ".jpg"
            examples.append(
                Example(
                    id=f"{name}/{path.stem}/{number}",
                    question_id=f"{name}/{path.stem}{suffix}",
                    prompt=_bare(question) + SHORT_ANSWER,
                    image=image if image.suffix else image.with_name(path.stem + suffix),
                    target=gold,
                    skill=name,
                    data={"question": _bare(question), "official": question, "gold": gold, "task": name},
                )
            )
        if len(examples) != 2:
            raise ValueError(f"{path}: expected two questions, found {len(examples)}")
        return examples

    @staticmethod
    def _key(task: str, stem: str, question: str) -> tuple[str, str, str]:
        return task, stem, _bare(question)

    def index(self, examples: Sequence[Example]) -> Mapping[Any, Example]:
        table: dict[Any, Example] = {e.id: e for e in examples}
        return table | {self._key(e.data["task"], e.id.split("/")[1], e.data["question"]): e for e in examples}

    def locate(self, prediction: Prediction, index: Mapping[Any, Example]) -> str | None:
        # LLaVA names both questions of a picture by "task/picture"; the prompt tells them apart.
        parts = str(prediction.question_id).split("/")
        example = index.get(self._key(parts[0], parts[-1].split(".")[0], prediction.prompt or ""))
        return example.id if example is not None else super().locate(prediction, index)

    def answers_in(self, path: Path) -> list[Prediction] | None:
        """The official tool's folder: <task>.txt with lines picture, question, gold, answer, tabs between."""
        if not path.is_dir():
            return None
        predictions = []
        for file in sorted(path.glob("*.txt")):
            for number, line in enumerate(load_text(file).split("\n"), 1):
                if not line.strip():
                    continue
                parts = line.split("\t")
                if len(parts) != 4:
                    raise ValueError(
                        f"{file}, line {number}: expected picture, question, gold and answer, tabs between"
                    )
                predictions.append(Prediction(f"{file.stem}/{parts[0]}", parts[3], prompt=parts[1], verbatim=True))
        return predictions

    def score(self, joined: Joined, folder: Path, options: Options) -> Score:
        answers = joined.last
        tasks: dict[str, dict[str, list[tuple[str, str]]]] = {}
        outcomes = {}
        for example in joined.examples:
            prediction = answers.get(example.id)
            # Nothing said is neither yes nor no: wrong.
            text, gold = prediction.text if prediction else "", example.data["gold"]
            picture = tasks.setdefault(example.data["task"], {}).setdefault(example.id.rsplit("/", 1)[0], [])
            picture.append((text, gold))
            outcomes[example.id] = Outcome(float(parse(text) == gold.lower()), parse(text))
        metrics = score_mme({name: list(pictures.values()) for name, pictures in tasks.items()})
        return Score(metrics["scores"]["Perception"]["total"], metrics, outcomes)

    def write_submission(self, joined: Joined, folder: Path, out: Path) -> Path | None:
        """`mme_results/<task>.txt`, what the official calculation.py reads."""
        answers = joined.last
        lines: dict[str, list[str]] = {}
        for example in joined.examples:
            text = answers[example.id].text if example.id in answers else ""
            picture = example.question_id.split("/")[-1]
            cells = [picture, example.data["official"], example.data["gold"], on_one_line(text)]
            lines.setdefault(example.data["task"], []).append("\t".join(cells) + "\n")
        for name, rows in lines.items():
            write_atomically(out / "mme_results" / f"{name}.txt", "".join(rows))
        return out / "mme_results"
