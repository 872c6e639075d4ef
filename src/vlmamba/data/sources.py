"""Where samples come from: LLaVA files, parquet, the procedural world. Each is a function from an index to a record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from vlmamba.data.entries import Entries, require_file
from vlmamba.data.parquet import ParquetRows, is_parquet, matching
from vlmamba.data.records import Record, llava_record
from vlmamba.data.sampling import Supply
from vlmamba.data.scenes import Question, SceneSample, World


@dataclass(frozen=True)
class ScenesConfig:
    """The procedural world as a source: endless, every sample new."""

    seed: int = 0
    split: str = "train"
    what: Literal["caption", "description", "conversation", "text", "patches"] = "conversation"
    """What is learned of a scene; `patches`: what lies where, for an encoder that is trained alone."""
    questions: int = 8
    """Most questions asked of one scene."""
    kinds: dict[str, float] | None = None
    """Weights of the kinds of picture; None: the world's own."""
    again: bool = False
    """Later epochs show the first one's scenes once more, in the same order, instead of new ones."""
    pictures: bool = True
    """False leaves the pictures out: what can be answered blind."""


@dataclass(frozen=True)
class LlavaConfig:
    """Conversations in LLaVA's form."""

    file: str = ""
    """JSON, JSON lines (.jsonl), or parquet with images inside (a file, a folder, or a pattern such as a-*.parquet)."""
    images: str | None = None
    """The folder that the image paths of JSON start from."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples: either `scenes` or `llava`; `weight` is how often an epoch walks through it."""

    scenes: ScenesConfig | None = None
    llava: LlavaConfig | None = None
    size: int = 0
    """Samples that count as one epoch of the endless scenes."""
    weight: float = 1.0


class Source(Protocol):
    """A function from an index to a record, the same in every process.

    Attributes:
        supply: what the order needs to know of it.
        name: the file that it reads; of scenes, their name.
    """

    supply: Supply
    name: Path

    def record(self, index: int) -> Record:
        """Sample `index`; raises `BadSampleError` for one that cannot be used."""
        ...

    def outline(self, index: int) -> Record:
        """The same, of pictures only their number: enough to know its length."""
        ...

    def fingerprint(self) -> str:
        """A hash of what it reads, pictures apart."""
        ...


class LlavaSource:
    """A LLaVA JSON or JSON lines file; entries and images are read when a sample is asked for."""

    def __init__(self, config: LlavaConfig, weight: float = 1.0):
        require_there(config)
        self.entries, self.name = Entries(config.file), Path(config.file)
        if not len(self.entries):
            raise ValueError(f"{config.file}: holds no samples")
        self.images = None if config.images is None else Path(config.images)
        self.supply = Supply(len(self.entries), weight)

    def record(self, index: int) -> Record:
        return llava_record(self.entries[index], index, self.images)

    def outline(self, index: int) -> Record:
        return self.record(index)

    def fingerprint(self) -> str:
        return f"{self.entries.fingerprint()} {self.images is None}"


class ParquetSource:
    """Parquet files with conversations and images inside."""

    def __init__(self, config: LlavaConfig, weight: float = 1.0):
        self.rows, self.name = ParquetRows(config.file), Path(config.file.replace("*", "all"))
        if not len(self.rows):
            raise ValueError(f"{config.file}: holds no samples")
        self.supply = Supply(len(self.rows), weight, blocks=self.rows.sizes, span=self.rows.span)

    def record(self, index: int) -> Record:
        return self.rows.record(index)

    def outline(self, index: int) -> Record:
        return self.rows.record(index, pictures=False)

    def fingerprint(self) -> str:
        return self.rows.fingerprint()


class ScenesSource:
    """Scenes of the procedural world: captions, dense descriptions, conversations about them, plain text, or marks."""

    def __init__(self, config: ScenesConfig, size: int, weight: float = 1.0):
        self.config, self.size = config, size
        self.world = World(config.seed, config.split, questions=config.questions, kinds=config.kinds)
        self.supply = Supply(size, weight, endless=True)
        self.name = Path(f"scenes-{config.seed}-{config.split}")

    def record(self, index: int) -> Record:
        index = index % self.size if self.config.again else index
        name = f"scene-{self.config.seed}-{self.config.split}-{index}"
        what = self.config.what
        if what == "text":
            return Record(id=name, text=self.world.text(index))
        if what == "patches":
            image, marks = self.world.marked(index)
            return Record(id=name, images=(image,), marks=tuple(marks))
        scene = self.world.sample(index)
        if what == "conversation":
            turns = _conversation(scene, index)
        else:
            turns = (("", scene.caption if what == "caption" else scene.description),)
        return Record(id=name, turns=turns, images=(scene.image,) if self.config.pictures else ())

    def outline(self, index: int) -> Record:
        return self.record(index)

    def fingerprint(self) -> str:
        return f"{self.config}"


def _conversation(scene: SceneSample, number: int) -> tuple[tuple[str, str], ...]:
    """All questions on a picture with their answers. Where words stand in it, the last of every second conversation
    names them, as TextVQA's prompt does: the last alone, so that no other answer can be read off it."""
    turns = [(_as_asked(question, number + i), question.answer) for i, question in enumerate(scene.questions)]
    if number % 2 and scene.written and turns and (last := scene.questions[-1]).kind in ("short", "yesno"):
        turns[-1] = (last.prompt(found=scene.written), last.answer)
    return tuple(turns)


def _as_asked(question: Question, number: int) -> str:
    """The question in one of the ways that people write it: every second one begins with a capital, every fourth
    comes with the benchmarks' instruction."""
    text = question.prompt(instruct=number % 4 == 0)
    return text if number // 4 % 2 else text[0].upper() + text[1:]


def require_there(config: LlavaConfig) -> None:
    """ValueError for a file or folder that is not there, as a run raises it; nothing is read."""
    if is_parquet(config.file):
        matching(config.file)
        return
    require_file(Path(config.file))
    if config.images is not None and not Path(config.images).is_dir():
        raise ValueError(f"{config.images}: no such folder of images (for {config.file})")


def open_source(config: SourceConfig) -> Source:
    """The source that a configuration names."""
    if config.scenes is not None:
        return ScenesSource(config.scenes, config.size, config.weight)
    assert config.llava is not None
    if is_parquet(config.llava.file):
        return ParquetSource(config.llava, config.weight)
    return LlavaSource(config.llava, config.weight)
