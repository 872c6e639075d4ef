"""The run configuration: frozen dataclasses, read from YAML with dotted overrides; rules.py says what they may not say.

Nothing here imports torch, so that a wrong recipe is refused at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vlmamba.data.sources import ScenesConfig, SourceConfig

PARTS = ("vision", "connector", "language")
PIPELINE_FILE = "pipeline.yaml"


class ConfigError(ValueError):
    """A mistake in a recipe or an override; its message is all that the user needs to see."""


@dataclass(frozen=True)
class PartConfig:
    """How one part of the model learns: not at all (`lr` 0), or at a peak learning rate, with weight decay."""

    lr: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """The model to train: an existing VL-Mamba (`path`), or one composed from parts.

    `vision` and `language` are each a local folder, a Hub id, `stage:NAME` (the result of another stage of the same
    pipeline), or a mapping of configuration fields for a part that starts from random weights. Without `vision` the
    language model is trained alone, on text; without `language` the encoder, on what lies in the patches of scenes, or
    by `contrastive`.
    """

    path: str | None = None
    vision: str | dict[str, Any] | None = None
    language: str | dict[str, Any] | None = None
    tokenizer: str | None = None
    connector: Literal["mlp", "vss-mlp", "vss-l2"] = "vss-l2"
    scan: Literal["bsm", "csm", "forward"] = "bsm"
    scan_weights: Literal["shared", "per-order"] = "shared"
    vision_layer: int = -2
    vision_cls: bool = False
    connector_width: int | None = None
    """Of the MLP in `mlp` and `vss-mlp`; None: the language model's."""
    image_place: Literal["before", "after"] = "before"
    """Where a picture stands: before the question about it, or after."""
    contrastive: Literal["softmax", "sigmoid"] | None = None
    """An encoder trained alone learns which text is a picture's, as CLIP does or as SigLIP."""

    def between(self) -> dict[str, Any]:
        """What a VLMambaConfig says of how its two parts are joined."""
        names = ("connector", "scan", "scan_weights", "connector_width", "vision_layer", "vision_cls")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class StageConfig:
    """What is learned from: the template, the shape of images, and the learning rate of each part."""

    template: Literal["plain", "v1"] = "v1"
    image_mode: Literal["crop", "pad"] = "pad"
    vision: PartConfig = PartConfig()
    connector: PartConfig = PartConfig()
    language: PartConfig = PartConfig()


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: the weights of `parts` stay frozen, adapters in them learn at the part's rate.

    Other parts with a learning rate (the connector, as a rule) are trained whole.
    """

    rank: int = 16
    alpha: float = 32.0
    """What an adapter adds is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["in_proj", "x_proj", "dt_proj", "out_proj"])
    """Linear maps, by the end of their name; vision encoders have q_proj, k_proj, v_proj, out_proj, fc1, fc2."""
    parts: list[Literal["vision", "connector", "language"]] = field(default_factory=lambda: ["language"])


@dataclass(frozen=True)
class OptimConfig:
    """AdamW under a cosine with warm-up; batches are counted in samples."""

    global_batch: int = 128
    micro_batch: int = 16
    epochs: float = 1.0
    max_steps: int | None = None
    """Steps in all; without it they follow from `epochs`."""
    time_budget: float | None = None
    """Minutes, from the first step's end on. The schedule then follows whichever is further, steps or time. Not
    bit-reproducible."""
    warmup: float = 0.03
    """Share of the run."""
    final_lr: float = 0.0
    """Share of the peak rate that the cosine ends at."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    grad_clip: float = 1.0
    max_length: int = 2048
    pack: bool = False
    """Several samples to a row, state and convolution reset between them."""
    pack_into: int | None = None
    """Tokens of such a row; None: `max_length`. Longer rows have less padding and there are fewer of them."""
    group_by_length: bool = False
    bf16: bool = True
    """bf16 autocast on CUDA; parameters, gradients and moments stay fp32. The CPU always computes in fp32."""
    spike: float = 10.0
    """A loss so many times the median of the 50 steps before stops the run; 0 never does."""
    compile: bool = False
    """torch.compile of every block."""
    capture: bool = False
    """Replay whole steps as CUDA graphs. Small models gain: launching their kernels takes longer than the kernels do.
    Batches are padded to a few sizes. One process, one micro-batch to a step; ignored on a CPU."""
    checkpoint_activations: bool | float = False
    """The language model's blocks of which only the input is kept, the rest being computed again in the backward pass:
    all of them (true), or a share, spread evenly: no more of them than memory asks for."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    """Steps between checkpoints."""
    keep: int = 2


@dataclass(frozen=True)
class LoggingConfig:
    every: int = 20
    """Steps between log lines."""
    tensorboard: bool = True


@dataclass(frozen=True)
class RunConfig:
    """One run: a model, data, a stage, and how it is optimised."""

    output: str
    data: list[SourceConfig]
    model: ModelConfig = ModelConfig()
    stage: StageConfig = StageConfig()
    lora: LoraConfig | None = None
    """Adapters instead of whole weights; None: none."""
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    workers: int = 4
    seed: int = 0
    device: str = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes (torchrun) share the work: each holds the whole model, or its share of it."""
    max_bad_share: float = 0.01
    """Samples that could not be read are left out and counted; a larger share stops the run."""

    def __post_init__(self) -> None:
        from vlmamba.training.rules import check  # late: it reads what is declared here

        check(self)


@dataclass(frozen=True)
class TokenizerConfig:
    """The package's own tokenizer, learned from the text of scenes."""

    scenes: ScenesConfig
    vocab_size: int = 2048
    """Most entries."""
    min_share: float = 0.005
    """Share of the texts that a word must occur in to be one token; rarer ones are spelled."""
    samples: int = 20000


@dataclass(frozen=True)
class PipelineConfig:
    """Stages that run one after another, each a recipe beside this file; the last one's model is the result."""

    stages: list[str]
    recipes: str = "."
    """The folder of the stages' recipes, from this file's."""
    overrides: list[str] = field(default_factory=list)
    """Dotted assignments for all stages, or for one: `stage1.model.scan=csm`. Those of the command line come after."""
    tokenizer: TokenizerConfig | None = None
    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    export_size_limit: float = field(default=0.0)
    """MB that the exported folder may take; 0 is no limit."""


def require(condition: bool, message: str) -> None:
    """ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


# Reading ------------------------------------------------------------------------------------------------------------


def load_config(file: str | Path, overrides: Sequence[str] = (), **values: Any) -> RunConfig:
    """Read a run's recipe.

    Args:
        file: YAML file, or the name of a shipped recipe such as `paper/stage1`.
        overrides: dotted assignments, `optim.max_steps=3`; a leading `--` is allowed, list items go by number.
        values: further top-level fields, e.g. `output`.

    Raises:
        ConfigError: an unknown key (with the nearest valid one), a value of the wrong type, a missing field.
    """
    path = find_recipe(file)
    require(
        path.name != PIPELINE_FILE,
        f"{file}: is a pipeline, not a recipe of one run; name its folder: vlmamba train {Path(file).parent}",
    )
    return parse(RunConfig, path, overrides, **values)


T = typing.TypeVar("T")


def parse(kind: type[T], file: str | Path, overrides: Sequence[str] = (), **values: Any) -> T:
    """Read `file` as `kind`, a frozen dataclass, after applying overrides; see `load_config`."""
    path = find_recipe(file)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {_one_line(str(error))}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds no mapping of keys; see recipes/ in the package for examples")
    raw |= values
    _check_keys(kind, raw, str(path))
    for override in overrides:
        _apply(kind, raw, override)
    return from_mapping(kind, raw, str(path))


def from_mapping(kind: type[T], raw: dict[str, Any], where: str = "configuration") -> T:
    """Make a `kind` from plain values, typed and checked; `where` names their origin in errors."""
    from jsonargparse import ArgumentError, ArgumentParser

    _check_keys(kind, raw, where)
    missing = [
        f.name
        for f in dataclasses.fields(kind)  # type: ignore[arg-type]
        if f.name not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        parsed = parser.instantiate(parser.parse_object(raw))
        return kind(**{f.name: parsed[f.name] for f in dataclasses.fields(kind)})  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except ArgumentError as error:
        raise ConfigError(f"{where}: {_cause(str(error))}") from None


def recipes_folder() -> Path:
    """Where the shipped recipes lie."""
    return Path(__file__).resolve().parent.parent / "recipes"


def find_recipe(name: str | Path) -> Path:
    """A file of that name, else a shipped recipe (`paper/stage1`, with or without .yaml)."""
    given = Path(name)
    shipped = recipes_folder() / given
    for path in (given, shipped, shipped.with_name(shipped.name + ".yaml")):
        if path.is_file():
            return path
    files = (p.relative_to(recipes_folder()) for p in recipes_folder().rglob("*.yaml"))
    known = sorted({str(p.parent if p.name == PIPELINE_FILE else p.with_suffix("")) for p in files})
    raise ConfigError(f"{name}: no such recipe file; shipped ones are {', '.join(known)}")


# Keys ---------------------------------------------------------------------------------------------------------------


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass in a type hint (`X`, `X | None`), if there is one."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((o for o in options if dataclasses.is_dataclass(o) and isinstance(o, type)), None)


def _item_of(hint: Any) -> Any:
    """The item's type if the hint is a list, else None."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else None


def _check_keys(kind: type, raw: dict[str, Any], where: str, prefix: str = "") -> None:
    """Refuse keys that `kind` does not have, at any depth, and name the nearest one that it has."""
    hints = typing.get_type_hints(kind)
    for key, value in raw.items():
        if key not in hints:
            raise ConfigError(f"{where}: unknown key {prefix}{key}{_nearest(str(key), hints, prefix)}")
        inner, item = _dataclass_of(hints[key]), _item_of(hints[key])
        if inner is not None and isinstance(value, dict):
            _check_keys(inner, value, where, f"{prefix}{key}.")
        elif item is not None and dataclasses.is_dataclass(item) and isinstance(value, list):
            for i, entry in enumerate(value):
                if isinstance(entry, dict):
                    _check_keys(typing.cast(type, item), entry, where, f"{prefix}{key}.{i}.")


def _nearest(key: str, known: typing.Iterable[str], prefix: str) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; known ones: {', '.join(prefix + n for n in names)}"


def _apply(kind: type, raw: dict[str, Any], override: str) -> None:
    """Put one `a.b.c=value` into the plain values; the value is read as YAML."""
    name, equals, text = override.removeprefix("--").partition("=")
    if not equals or not name:
        raise ConfigError(f"override {override!r}: write it as key=value, e.g. --optim.max_steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a valid YAML value") from None
    if isinstance(value, str):
        value = _number(value)
    here: Any = raw
    *path, last = name.split(".")
    for step in path:
        here = _descend(here, step, override)
    if isinstance(here, list):
        _descend(here, last, override)
        here[int(last)] = value
    else:
        here[last] = value
    _check_keys(kind, raw, f"override {override!r}")


def _descend(here: Any, step: str, override: str) -> Any:
    """The container at `step`; a missing mapping is made."""
    if isinstance(here, list):
        if not step.isdigit() or int(step) >= len(here):
            raise ConfigError(f"override {override!r}: {step!r} is no item of a list of {len(here)}; count from 0")
        return here[int(step)]
    if here.get(step) is None:
        here[step] = {}
    if not isinstance(here[step], dict | list):
        raise ConfigError(f"override {override!r}: {step} is a value, not a group of keys")
    return here[step]


def _number(text: str) -> str | float:
    """YAML 1.1 reads 1e-3 as text; people mean the number."""
    return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else text


# Messages -----------------------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cause(message: str) -> str:
    """The key and the first reason out of jsonargparse's nested report."""
    lines = [line.strip() for line in message.splitlines()]
    keys = [match[1] for line in lines if (match := re.search(r'key "([^"]+)"', line))]
    telling = re.compile(r"Expected|not accepted|Got value|required")
    reasons = [line.removeprefix("- ") for line in lines if telling.search(line)]
    reason = next((r for r in reasons if "NoneType" not in r), lines[-1])
    given = next((line for line in lines if line.startswith("Given value:")), "") if "Got value" not in reason else ""
    text = re.sub(r"a <class '(\w+)'>", r"\1", reason)
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", text)
    return _one_line(f"{'.'.join(keys)}: {text} {given}" if keys else f"{text} {given}").rstrip()
