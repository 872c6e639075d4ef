"""Reading anybody's answers: our own files, LLaVA's, and the benchmarks' submission formats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmamba.evaluation.files import load_json_lines
from vlmamba.evaluation.task import Example, Joined, Prediction, Task

# Names that the formats give to a question's id and to its answer; of those in a record the first counts.
_IDS = ("question_id", "questionId", "index", "id")
# A table of MMBench rows has the truth under "answer", and what was said under "prediction".
_TEXTS = ("text", "prediction", "answer")


def read_predictions(task: Task, path: Path) -> list[Prediction]:
    """The answers in a file or folder, in its order. ValueError where it holds none."""
    if not path.exists():
        raise ValueError(f"there is no prediction file {path}")
    predictions = task.answers_in(path)
    if predictions is None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: {task.title} predictions come in a file")
        predictions = [_from_record(record, f"{path}, entry {i}") for i, record in enumerate(_records(path), 1)]
    if not predictions:
        raise ValueError(f"{path} holds no answers")
    return predictions


def _records(path: Path) -> Sequence[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is no text file of answers: {error}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return load_json_lines(path)
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a list or an object of answers, found {type(value).__name__}")
    if "text" in value and any(name in value for name in _IDS):
        return [value]  # a JSON-lines file of one line
    if isinstance(value.get("answers"), list):
        # Our own result file, which also lists what was not answered.
        return [a for a in value["answers"] if not isinstance(a, dict) or a.get("text") is not None]
    table = value.get("outputs", value.get("results", value))  # ScienceQA's result file, or a plain id -> answer
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected an object of ids and answers, found {type(table).__name__}")
    return [{"question_id": key, "answer": answer} for key, answer in table.items()]


def _from_record(record: Any, where: str) -> Prediction:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with question_id and text, found {record!r}")
    ids = [name for name in _IDS if name in record]
    texts = [name for name in _TEXTS if name in record]
    if not ids or not texts:
        raise ValueError(
            f"{where}: an answer needs an id ({', '.join(_IDS)}) and a text ({', '.join(_TEXTS)}); found "
            f"{', '.join(map(str, record)) or 'nothing'}"
        )
    if not isinstance(record[ids[0]], (str, int, float)):
        raise ValueError(f"{where}: the id must be a text or a number, found {record[ids[0]]!r}")
    if not isinstance(record.get("prompt"), (str, type(None))):
        raise ValueError(f"{where}: the prompt must be a text, found {record['prompt']!r}")
    value = record[texts[0]]
    if value is not None and not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: the answer must be a text, found {value!r}")
    return Prediction(
        question_id=record[ids[0]],
        text="" if value is None else str(value),
        prompt=record.get("prompt"),
        fields=record,
        verbatim=texts[0] != "text",
    )


def join(task: Task, examples: Sequence[Example], predictions: Sequence[Prediction], source: str) -> Joined:
    """Match predictions with examples. ValueError when the file belongs to another benchmark."""
    named = {str(p.fields["task"]) for p in predictions if "task" in p.fields} - {task.name}
    if named:
        raise ValueError(f"{source} holds answers to {', '.join(sorted(named))}, not to {task.name}")
    by_id = {example.id: example for example in examples}
    index = task.index(examples)
    pairs: list[tuple[Example, Prediction]] = []
    unknown: list[Any] = []
    for prediction in predictions:
        if task.leaves_out(prediction):
            continue
        own = prediction.fields.get("id") if "task" in prediction.fields else None
        key = own if isinstance(own, str) and own in by_id else task.locate(prediction, index)
        if key is None:
            unknown.append(prediction.question_id)
        else:
            pairs.append((by_id[key], prediction))
    if len(unknown) > len(pairs) or _other_questions(pairs):
        reason = (
            f"{len(unknown)} of its {len(predictions)} answers are to questions that the data set does not have, such "
            f"as {unknown[0]!r} (it has {examples[0].question_id!r} and others)"
            if len(unknown) > len(pairs)
            else "its ids exist, but its prompts ask other questions"
        )
        raise ValueError(f"{source} does not answer {task.title}: {reason}; is it another benchmark's file?")
    return Joined(examples, pairs, unknown)


def _other_questions(pairs: Sequence[tuple[Example, Prediction]]) -> bool:
    """Whether ids match by chance only: small integers name questions in several benchmarks. Prompts, none of
    which holds its question, tell (very short ones may be anybody's stand-ins)."""
    told = [(e, p.prompt) for e, p in pairs if p.prompt is not None and len(p.prompt) > 10 and "question" in e.data]
    if len(told) < len(pairs) or not told:
        return False
    return not any(str(example.data["question"]).strip().lower() in prompt.lower() for example, prompt in told)
