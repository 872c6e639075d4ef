"""What a benchmark is to us: examples to ask, and a score for the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vlmamba.evaluation.files import find
from vlmamba.evaluation.scoring.mmbench import Rule

if TYPE_CHECKING:
    from vlmamba.evaluation.judge import Judge

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Example:
    """One question.

    id: unique within the task. question_id: as LLaVA's answer files and the official ones name it, unique or not.
    prompt: without the image placeholder. image: a path, or the file's bytes; None for a question without one.
    target: the right answer, for people to read. skill: the group it counts to in a report. data: what the scorer
    needs of the official record.
    """

    id: str
    question_id: Any
    prompt: str
    image: Path | bytes | None
    target: str
    skill: str
    data: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Prediction:
    """One answer as it stands in somebody's file.

    fields: the whole record. verbatim: it comes from the benchmark's own submission format, so no conversion of
    LLaVA's is applied to it before scoring."""

    question_id: Any
    text: str
    prompt: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    verbatim: bool = False


@dataclass
class Joined:
    """Predictions matched with examples: in the file's order, and what did not match."""

    examples: Sequence[Example]
    pairs: list[tuple[Example, Prediction]]
    unknown: list[Any]

    @property
    def last(self) -> dict[str, Prediction]:
        """One prediction per example: the last one where there are several, as a table built from lines has it."""
        return {example.id: prediction for example, prediction in self.pairs}

    def coverage(self) -> dict[str, int]:
        answered = len(self.last)
        return {
            "questions": len(self.examples),
            "answered": answered,
            "missing": len(self.examples) - answered,
            "duplicates": len(self.pairs) - answered,
            "unknown": len(self.unknown),
        }


@dataclass(frozen=True)
class Outcome:
    """One question's result: score in [0, 1] (None: not judged), and what the scorer read in the answer."""

    score: float | None
    parsed: str


@dataclass
class Score:
    """headline: the number papers print, None when it cannot be had here (a server or a judge has it). metrics: all
    numbers under the official tool's names. outcomes: example id to result. notes: what a reader must know."""

    headline: float | None
    metrics: dict[str, Any]
    outcomes: dict[str, Outcome]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """What changes a score besides the answers; recorded with every result.

    rule: MMBench's rule version. judge: for MM-Vet and what MMBench's rules leave open. few_shot: MM-Vet's official
    few-shot text, None for our own wording. runs: how often MM-Vet is graded."""

    rule: Rule = "2023-12"
    judge: Judge | None = None
    few_shot: str | None = None
    runs: int = 1


class Task(ABC):
    """A benchmark. Subclasses document the folder's layout, as it is downloaded, in their docstring.

    metric: what the headline is. version goes up whenever prompts or scores change. paper: the published VL-Mamba's
    headline. variants: the named prompt variants, the first is the default. files: where the annotations are one file,
    its name as it is downloaded, then patterns of others that it may have."""

    name: ClassVar[str]
    title: ClassVar[str]
    version: ClassVar[int] = 1
    files: ClassVar[tuple[str, ...]] = ()
    metric: str
    paper: ClassVar[float | None] = None
    max_new_tokens: int = 128
    variants: ClassVar[tuple[str, ...]] = ("llava",)
    # The variant whose prompts need the fewest files: enough to score answers that others have made.
    scoring_variant: ClassVar[str] = "llava"
    source: ClassVar[str]
    # Sub-folders of a common data folder that may hold this benchmark; the folder itself may as well.
    folders: ClassVar[tuple[str, ...]] = ()

    def annotations(self, folder: Path) -> list[str]:
        """Which annotation files are missing from `folder`, a line each that names them; empty when none is."""
        return [] if find(folder, *self.files) else [f"{self.files[0]} is missing"]

    def annotation_file(self, folder: Path) -> Path:
        """The one of `files` that is there; ValueError as `require_folder` raises it."""
        self.require_folder(folder)
        path = find(folder, *self.files)
        assert path is not None
        return path

    @abstractmethod
    def examples(self, folder: Path, variant: str) -> list[Example]:
        """All questions in the official order. Images are named, not opened. ValueError for a damaged file."""

    @abstractmethod
    def score(self, joined: Joined, folder: Path, options: Options) -> Score:
        """The official score of the answers, a missing one treated as the official pipeline does."""

    def locate(self, prediction: Prediction, index: Mapping[str, Example]) -> str | None:
        """The id of the example that a prediction answers, or None."""
        key = str(prediction.question_id)
        return key if key in index else None

    def leaves_out(self, prediction: Prediction) -> bool:
        """Whether the official pipeline passes over this line of an answer file."""
        return False

    def index(self, examples: Sequence[Example]) -> Mapping[Any, Example]:
        """What `locate` looks things up in."""
        return {example.id: example for example in examples}

    def logged_prompt(self, example: Example) -> str:
        """The prompt as LLaVA's answer files record it, so that its scripts read ours."""
        return example.prompt

    def judge_prompts(self, joined: Joined, options: Options) -> tuple[list[str], int]:
        """What a judge may be asked, repeats left out, and the most tokens of a reply: for an estimate of the cost."""
        return [], 0

    def answers_in(self, path: Path) -> list[Prediction] | None:
        """Predictions in a form only this benchmark has (a folder, a table); None when `path` is none of it."""
        return None

    def write_submission(self, joined: Joined, folder: Path, out: Path) -> Path | None:
        """Write what the benchmark's server or judge takes into the folder `out`; None where there is no such thing."""
        return None

    def image_folder(self) -> Path | None:
        """Where pictures are, when not beside the questions: a report looks there."""
        return None

    def checked_variant(self, variant: str | None) -> str:
        variant = variant or self.variants[0]
        if variant not in self.variants:
            raise ValueError(f"{self.name} has no prompt variant {variant!r}: it has {', '.join(self.variants)}")
        return variant

    def require_folder(self, folder: Path) -> None:
        """ValueError that names what is missing, and where to get it, unless all annotation files are there."""
        missing = self.annotations(folder) if folder.is_dir() else [f"the folder {folder} does not exist"]
        if missing:
            raise ValueError(f"{folder} is no {self.title} folder: {'; '.join(missing)}. {self.source}")


def mean_score(outcomes: Mapping[str, Outcome]) -> float:
    values = [outcome.score for outcome in outcomes.values() if outcome.score is not None]
    return sum(values) / len(values) if values else 0.0
