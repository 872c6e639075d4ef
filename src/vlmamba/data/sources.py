"""Where samples come from: LLaVA files, and the procedural world. Each is a function from an index to a record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from vlmamba.data.records import Record, llava_length, llava_record, read_llava
from vlmamba.data.sampling import Supply
from vlmamba.data.scenes import Question, World


@dataclass(frozen=True)
class ScenesConfig:
    """The procedural world as a source: endless, every sample new."""

    seed: int = 0
    split: str = "train"
    what: Literal["caption", "description", "conversation", "text"] = "conversation"
    questions: int = 8
    """Most questions asked of one scene."""
    kinds: dict[str, float] | None = None
    """Weights of the kinds of picture; None: the world's own."""
    pictures: bool = True
    """False leaves the pictures out: what can be answered blind."""


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA JSON file and the folder that its image paths start from."""

    file: str = ""
    images: str | None = None


@dataclass(frozen=True)
class SourceConfig:
    """One source of samples: either `scenes` or `llava`; `weight` is how often an epoch walks through it."""

    scenes: ScenesConfig | None = None
    llava: LlavaConfig | None = None
    size: int = 0
    """Samples that count as one epoch of the endless scenes."""
    weight: float = 1.0


class Source(Protocol):
    """A function from an index to a record, the same in every process; `supply` is what the order needs of it."""

    @property
    def supply(self) -> Supply: ...

    def record(self, index: int) -> Record:
        """Sample `index`; raises `BadSampleError` for one that cannot be used."""
        ...


class LlavaSource:
    """A LLaVA JSON (or JSON lines) file; images are read when a sample is encoded.

    Args:
        image_tokens: positions that an image takes in a sequence, for the table of lengths.
    """

    def __init__(self, config: LlavaConfig, weight: float = 1.0, image_tokens: int = 0):
        self.entries = read_llava(config.file)
        if not self.entries:
            raise ValueError(f"{config.file}: holds no samples")
        self.images = None if config.images is None else Path(config.images)
        if self.images is not None and not self.images.is_dir():
            raise ValueError(f"{self.images}: no such folder of images (for {config.file})")
        lengths = np.array([llava_length(entry, image_tokens) for entry in self.entries])
        self.supply = Supply(len(self.entries), weight, lengths=lengths)

    def record(self, index: int) -> Record:
        return llava_record(self.entries[index], index, self.images)


class ScenesSource:
    """Scenes of the procedural world: captions, dense descriptions, conversations about them, or plain text."""

    def __init__(self, config: ScenesConfig, size: int, weight: float = 1.0):
        self.config = config
        self.world = World(config.seed, config.split, questions=config.questions, kinds=config.kinds)
        self.supply = Supply(size, weight, endless=True)

    def record(self, index: int) -> Record:
        name = f"scene-{self.config.seed}-{self.config.split}-{index}"
        what = self.config.what
        if what == "text":
            return Record(id=name, text=self.world.text(index))
        scene = self.world.sample(index)
        if what == "conversation":
            turns = tuple((_as_asked(q, index + i), q.answer) for i, q in enumerate(scene.questions))
        else:
            turns = (("", scene.caption if what == "caption" else scene.description),)
        return Record(id=name, turns=turns, images=(scene.image,) if self.config.pictures else ())


def _as_asked(question: Question, number: int) -> str:
    """The question in one of the ways that people write it: every second one begins with a capital, every fourth
    comes with the benchmarks' instruction."""
    text = question.prompt(instruct=number % 4 == 0)
    return text if number // 4 % 2 else text[0].upper() + text[1:]


def open_source(config: SourceConfig, image_tokens: int = 0) -> Source:
    """The source that a configuration names."""
    if config.scenes is not None:
        return ScenesSource(config.scenes, config.size, config.weight)
    assert config.llava is not None
    return LlavaSource(config.llava, config.weight, image_tokens)
