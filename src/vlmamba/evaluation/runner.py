"""Asking: in batches, over several processes, and on from where a kill has cut it off."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlmamba.evaluation.files import fingerprint, load_json, write_json
from vlmamba.evaluation.task import Example, Task

IDENTITY = "run.json"


@dataclass(frozen=True)
class Request:
    """One question as the answerer gets it; the image, a path or a file's bytes, stands before the text."""

    id: str
    text: str
    image: Path | bytes | None
    max_new_tokens: int


class Answerer(Protocol):
    """What answers questions: a model's `generate`, an engine, or an HTTP endpoint."""

    def describe(self) -> Mapping[str, Any]:
        """What a result records: at least `model`, `weights` (a hash) and `decoding`."""

    def answer(self, requests: Sequence[Request]) -> Sequence[str]:
        """One text per request, in their order."""


@runtime_checkable
class ReadsAhead(Protocol):
    """An answerer that can read pictures while it answers."""

    def read_ahead(self, requests: Sequence[Request]) -> None:
        """Called with this batch and the next before this one is asked; must not wait."""


@dataclass(frozen=True)
class Shard:
    """Which part of the questions this process asks, and how it waits for the others.

    patience: seconds without any new answer by another process after which the first process gives up."""

    rank: int = 0
    world_size: int = 1
    patience: float = 1800.0
    poll: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in 0..{self.world_size - 1}, found {self.rank}")


class AnswerLog:
    """The answers of one process, one JSON line each, on disk before the next batch is asked."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"answers-{shard.rank}-of-{shard.world_size}.jsonl"
        _cut_torn_line(self.path)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())


def _cut_torn_line(path: Path) -> None:
    """A kill in mid-write leaves half a line at the end; that question is asked again."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def read_answers(folder: Path) -> dict[str, dict[str, Any]]:
    """All answers in a run's folder by question id, whichever and how many processes wrote them; the first counts."""
    answers: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("answers-*-of-*.jsonl")):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):  # what follows the last newline is torn
            try:
                record = json.loads(line)
                answers.setdefault(record["id"], record)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is damaged ({error}): remove it to ask again") from error
    return answers


def claim_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make sure that a run's folder holds answers of this very run only, or none yet."""
    path = folder / IDENTITY
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        write_json(path, identity)
    other = load_json(path)
    if other != identity:
        names = sorted(k for k in {*other, *identity} if other.get(k) != identity.get(k))
        raise ValueError(
            f"{folder} holds another run, with a different {', '.join(names)}: name another output folder, or remove it"
        )


def by_picture(examples: Sequence[Example]) -> list[list[Example]]:
    """Questions in groups that share a picture, in order of first appearance."""
    groups: dict[Any, list[Example]] = {}
    for example in examples:
        groups.setdefault(("text", example.id) if example.image is None else example.image, []).append(example)
    return list(groups.values())


def batches_of(groups: Iterable[Sequence[Example]], size: int) -> Iterator[list[Example]]:
    """Batches of at most `size` questions, the longest texts first: a batch then holds texts of about one length, and
    what does not fit into memory fails at once. A group is split only where it is larger than a batch."""
    batch: list[Example] = []
    for group in sorted(groups, key=lambda group: -max((len(example.prompt) for example in group), default=0)):
        if batch and len(batch) + len(group) > size:
            yield batch
            batch = []
        batch += group
        while len(batch) > size:
            yield batch[:size]
            batch = batch[size:]
    if batch:
        yield batch


def identity_of(task: Task, examples: Sequence[Example], variant: str, answerer: Answerer) -> dict[str, Any]:
    """What makes two runs the same: answers of one may stand in for the other's."""
    return {
        "task": task.name,
        "task_version": task.version,
        "variant": variant,
        "questions": len(examples),
        "prompts": fingerprint(text for example in examples for text in (example.id, example.prompt)),
        "max_new_tokens": task.max_new_tokens,
        **answerer.describe(),
    }


def ask(
    task: Task, examples: Sequence[Example], answerer: Answerer, folder: Path, shard: Shard, batch_size: int
) -> dict[str, dict[str, Any]] | None:
    """Ask all questions that have no answer in `folder` yet. The first process waits for the others and returns every
    answer by id; the others return None."""
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, found {batch_size}")
    log = AnswerLog(folder, shard)
    done = read_answers(folder)
    groups = by_picture(examples)[shard.rank :: shard.world_size]
    unanswered = [[example for example in group if example.id not in done] for group in groups]
    batches = list(batches_of(unanswered, batch_size))
    total, left = sum(map(len, groups)), sum(map(len, batches))
    with _progress(shard) as progress:
        bar = progress.add_task(task.title, total=total, completed=total - left)
        for batch, following in zip(batches, [*batches[1:], []]):
            if isinstance(answerer, ReadsAhead):
                answerer.read_ahead(_requests(task, batch + following))
            log.append(_answer(task, batch, answerer))
            progress.advance(bar, len(batch))
    return _gather(examples, folder, shard) if shard.rank == 0 else None


def _requests(task: Task, batch: Sequence[Example]) -> list[Request]:
    return [Request(e.id, e.prompt, e.image, task.max_new_tokens) for e in batch]


def _answer(task: Task, batch: Sequence[Example], answerer: Answerer) -> list[dict[str, Any]]:
    texts = answerer.answer(_requests(task, batch))
    if len(texts) != len(batch):
        raise ValueError(f"the answerer gave {len(texts)} answers to {len(batch)} questions")
    return [
        {
            "task": task.name,
            "id": e.id,
            "question_id": e.question_id,
            "prompt": task.logged_prompt(e),
            "text": text.strip(),
        }
        for e, text in zip(batch, texts)
    ]


def _gather(examples: Sequence[Example], folder: Path, shard: Shard) -> dict[str, dict[str, Any]]:
    wanted = {example.id for example in examples}
    seen, since = -1, time.monotonic()
    while True:
        answers = read_answers(folder)
        missing = wanted - answers.keys()
        if not missing:
            return {example.id: answers[example.id] for example in examples}
        if len(answers) != seen:
            seen, since = len(answers), time.monotonic()
        elif time.monotonic() - since > shard.patience:
            raise ValueError(
                f"{len(missing)} answers are missing in {folder}, and for {shard.patience:.0f} s no process has added "
                "one: start the same command again, it asks only what is missing"
            )
        time.sleep(shard.poll)


def _progress(shard: Shard) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    eta = (TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, *eta, console=Console(stderr=True), disable=shard.rank != 0)
