"""MMBench, English dev: multiple choice, each question asked once per rotation of its options."""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmamba.evaluation.files import require
from vlmamba.evaluation.scoring.mmbench import infer_option, options_of, score_mmbench
from vlmamba.evaluation.task import OPTION_LETTER, Example, Joined, Options, Outcome, Prediction, Score, Task

_COLUMNS = ["index", "question", "A", "B", "answer", "image"]
_SUBMISSION = ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
# Cells that pandas, which the official tools read the table with, takes for empty.
_EMPTY = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip
# An image cell this short is no picture but the index of the row that holds it.
_REFERENCE = 64
_REPLY_TOKENS = 8


def _cells(path: Path) -> list[dict[str, str | None]]:
    limit = csv.field_size_limit(1 << 30)  # pictures are cells of this table
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged: not a table of tab-separated values ({error})") from error
    finally:
        csv.field_size_limit(limit)
    return [{k: None if v is None or v in _EMPTY else v for k, v in row.items() if k is not None} for row in rows]


def _index(row: Mapping[str, Any], where: str) -> int:
    try:
        return int(float(row["index"]))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{where}: the index must be a number, found {row['index']!r}") from None


def _is_none(text: str | None) -> bool:
    return text is None or text.lower() in ("nan", "none")


def prompt_of(row: Mapping[str, Any]) -> str:
    """LLaVA's prompt: hint, question and options up to the first empty one."""
    lines = [] if _is_none(row.get("hint")) else [row["hint"]]
    lines.append(row["question"])
    for letter in "ABCD":
        if _is_none(row.get(letter)):
            break
        lines.append(f"{letter}. {row[letter]}")
    return "\n".join(lines) + OPTION_LETTER


def _none_of(options: Options) -> str:
    """The letter that means none of the options, by rule version."""
    return "E" if options.rule == "2023-12" else "Z"


def judge_prompt(row: Mapping[str, Any], prediction: str, none: str) -> str:
    """Our own wording: the official prompt belongs to its authors."""
    options = "\n".join(f"{letter}. {text}" for letter, text in options_of(row).items())
    return (
        "Which option does this answer to a multiple-choice question mean? Reply with that option's letter and nothing "
        f"else, or with {none} when it means none of them.\n\nQuestion: {row['question']}\n{options}\n"
        f"Answer: {prediction}\nLetter:"
    )


class MMBench(Task):
    """A folder with the dev table of https://github.com/open-compass/MMBench, tab-separated, pictures in base64:

        mmbench_dev_20230712.tsv (or mmbench_dev_en_20231003.tsv, MMBench_DEV_EN.tsv)

    Columns: index, question, hint, A, B, C, D, answer, category, image, source, l2-category, comment, split.
    """

    name = "mmbench"
    folders = ("mmbench", "MMBench")
    files = (
        *("mmbench_dev_20230712.tsv", "mmbench_dev_2*.tsv", "mmbench_dev_en*.tsv", "MMBench_DEV_EN*.tsv"),
        *("*mmbench*dev*.tsv", "*.tsv"),
    )
    title = "MMBench"
    version = 2
    metric = "circular accuracy"
    paper = 57.0
    max_new_tokens = 1024
    source = "The table is at https://download.openmmlab.com/mmclassification/datasets/mmbench/mmbench_dev_20230712.tsv"

    def examples(self, folder: Path, variant: str) -> list[Example]:
        path = self.annotation_file(folder)
        rows = _cells(path)
        if not rows:
            raise ValueError(f"{path} has no rows")
        require(rows[0], _COLUMNS, str(path))
        images = {row["index"]: row["image"] for row in rows}
        examples = []
        for number, row in enumerate(rows, 2):
            where = f"{path}, row {number}"
            for column in ("question", "answer", "A"):
                if row[column] is None:
                    raise ValueError(f"{where}: the column {column} is empty")
            index = _index(row, where)
            cell = row.pop("image")
            data: dict[str, Any] = {**row, "index": index}
            if cell is not None and len(cell) <= _REFERENCE and cell in images:
                cell = images[cell]
            examples.append(self._example(index, data, cell, where))
        return examples

    def _example(self, index: int, data: dict[str, Any], cell: str | None, where: str) -> Example:
        try:
            image = None if cell is None else base64.b64decode(cell, validate=False)
        except binascii.Error as error:
            raise ValueError(f"{where}: the image is no base64 ({error})") from error
        return Example(
            id=str(index),
            question_id=index,
            prompt=prompt_of(data),
            image=image,
            target=data["answer"],
            skill=str(data.get("l2-category") or data.get("category")),
            data=data,
        )

    def leaves_out(self, prediction: Prediction) -> bool:
        # With --all-rounds LLaVA rotates each row's options as well: the letters of those rounds name other options.
        return bool(prediction.fields.get("round_id"))

    def locate(self, prediction: Prediction, index: Mapping[Any, Example]) -> str | None:
        key = str(prediction.question_id).removesuffix(".0")
        return key if key in index else None

    def answers_in(self, path: Path) -> list[Prediction] | None:
        """The submission: a table with the columns index and prediction (xlsx, or the same as tsv)."""
        if path.suffix == ".xlsx":
            rows = _read_xlsx(path)
        elif path.suffix == ".tsv":
            rows = list(_cells(path))
        else:
            return None
        predictions = []
        for number, row in enumerate(rows, 2):
            require(row, ["index", "prediction"], f"{path}, row {number}")
            # The official tool reads an empty cell as not-a-number and matches the word it prints for it, "nan".
            text = "nan" if row["prediction"] is None else str(row["prediction"])
            predictions.append(Prediction(_index(row, f"{path}, row {number}"), text, verbatim=True))
        return predictions

    @staticmethod
    def _text(prediction: Prediction) -> str:
        # `null` in somebody's JSON is a missing value, and the official tool matches the word it prints for it. So it
        # does with nothing said, which is an empty cell in the table that LLaVA submits.
        said = [prediction.fields[name] for name in ("text", "prediction") if name in prediction.fields]
        return "None" if said and said[0] is None else prediction.text or "nan"

    def _rows(self, joined: Joined) -> list[dict[str, Any]]:
        said = {qid: self._text(prediction) for qid, prediction in joined.last.items()}
        return [{**e.data, "prediction": said.get(e.id, "nan")} for e in joined.examples]

    def judge_prompts(self, joined: Joined, options: Options) -> tuple[list[str], int]:
        none = _none_of(options)
        # At most these: a wrong copy ends its group before the others are asked.
        return [
            judge_prompt(row, row["prediction"], none)
            for row in self._rows(joined)
            if infer_option(row["prediction"], options_of(row), options.rule) is None
        ], _REPLY_TOKENS

    def score(self, joined: Joined, folder: Path, options: Options) -> Score:
        none = _none_of(options)
        judge, tries = options.judge, dict[int, int]()

        def ask(row: Mapping[str, Any], prediction: str) -> str | None:
            assert judge is not None
            turn = tries[row["index"]] = tries.get(row["index"], -1) + 1
            return judge.ask(judge_prompt(row, prediction, none), max_tokens=_REPLY_TOKENS, sample=(turn,))

        metrics = score_mmbench(self._rows(joined), options.rule, ask if judge else None)
        metrics["rule"] = options.rule
        # A question counts by its group; its copies have no outcomes of their own.
        outcomes = {
            qid: Outcome(float(hit), metrics["inferred"][qid] or "undecided") for qid, hit in metrics["hit"].items()
        }
        notes = [f"rule version {options.rule}"]
        if metrics["undecided"]:
            by = "the judge left" if judge else "without a judge,"
            notes.append(f"{by} {len(metrics['undecided'])} answers undecided, counted wrong")
        return Score(100 * metrics["acc"]["Overall"], metrics, outcomes, notes)

    def write_submission(self, joined: Joined, folder: Path, out: Path) -> Path | None:
        """`mmbench_submission.xlsx` for the MMBench server."""
        return _write_xlsx(out / "mmbench_submission.xlsx", self._rows(joined))


def _openpyxl(why: str) -> Any:
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(f"{why} needs openpyxl: pip install 'vlmamba[eval]'") from error
    return openpyxl


def _read_xlsx(path: Path) -> list[dict[str, Any]]:
    openpyxl = _openpyxl(f"reading {path}")
    try:
        lines = list(openpyxl.load_workbook(path, read_only=True, data_only=True).active.iter_rows(values_only=True))
    except Exception as error:  # openpyxl raises whatever zipfile and its XML parser raise
        raise ValueError(f"{path} is damaged: no xlsx table ({error})") from error
    header = [str(name) for name in lines[0]] if lines else []
    rows = []
    for line in lines[1:]:
        cells = {name: None if isinstance(v, str) and v in _EMPTY else v for name, v in zip(header, line)}
        if cells.get("index") is not None:
            rows.append(cells)
    return rows


def _write_xlsx(path: Path, rows: list[dict[str, Any]]) -> Path:
    openpyxl = _openpyxl(f"writing {path}")
    book = openpyxl.Workbook()
    book.active.append(_SUBMISSION)
    for number, row in enumerate(rows, 2):
        for column, name in enumerate(_SUBMISSION, 1):
            cell = book.active.cell(number, column)
            value = row.get(name)
            if isinstance(value, str):
                # Characters that XML cannot hold go, and a text that begins with "=" is no formula.
                cell.value = openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE.sub("", value)
                cell.data_type = "s"
            else:
                cell.value = value
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    book.save(temporary)
    temporary.replace(path)
    return path
