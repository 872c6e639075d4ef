"""What is compared: the variants of each axis, how much of everything a run gets, and the recipe of each of its stages.

Recipes are the nano model's own with other values in a few places; nothing here trains or measures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlmamba.training.config import RunConfig, load_config

HERE = Path(__file__).parent
TOKENIZER = "tokenizer"
MATCHED = 1112
"""Hidden width at which `mlp` has the parameters of `vss-l2`, 570 thousand, to 0.2 %, in whole tiles of eight, for an
encoder and a language model both of width 256; `vss-mlp` has them by itself."""


@dataclass(frozen=True)
class Scale:
    """How much of everything. Every stage ends by steps, not by time, so that runs read the same tokens.

    pictures: that each encoder of stage 0 sees. text: steps of the language model's stage 0. align, instruct: steps of
    stages 1 and 2, of `batch` samples. benchmark: pictures of each benchmark. questions, control, probe: asked of the
    skills, without or with shuffled pictures, and of tables. vision, language: fields that replace those of the parts.
    """

    pictures: int = 204_800
    text: int = 800
    align: int = 150
    instruct: int = 1000
    batch: int = 64
    benchmark: int = 100
    questions: int = 2000
    control: int = 500
    probe: int = 500
    samples: int = 20_000
    longest: int = 64
    vision: dict[str, Any] = field(default_factory=dict)
    language: dict[str, Any] = field(default_factory=dict)


FULL = Scale()
TOY = Scale(
    pictures=4,
    text=1,
    align=1,
    instruct=2,
    batch=2,
    benchmark=1,
    questions=6,
    control=2,
    probe=4,
    samples=40,
    longest=2,
    vision={
        "image_size": 128, "patch_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    language={"hidden_size": 32, "num_hidden_layers": 1},
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One row of a comparison: the baseline with some things changed.

    model: fields of the recipe's `model` section. encoder, language: which of stage 0's. align: whether there is a
    stage 1. share: of the usual data, in each of so many epochs. reference: the variant it is held against.
    """

    name: str
    axis: str
    what: str
    model: dict[str, Any] = field(default_factory=dict)
    encoder: str = "patches"
    language: str = "language"
    align: bool = True
    share: float = 1.0
    epochs: int = 1
    reference: str = "baseline"

    @property
    def data(self) -> tuple[float, int]:
        """Variants in which it is the same see the same samples, in the same order."""
        return self.share, self.epochs


VARIANTS = (
    Variant("baseline", "all", "patches, base language model, vss-l2, bsm shared, stages 1 and 2"),
    Variant("mlp", "connector", "mlp, as many parameters", {"connector": "mlp", "connector_width": MATCHED}),
    Variant("vss-mlp", "connector", "vss-mlp", {"connector": "vss-mlp"}),
    Variant("mlp-narrow", "connector", "mlp, the paper's width", {"connector": "mlp"}),
    Variant("csm", "scan", "csm, shared", {"scan": "csm"}),
    Variant("forward", "scan", "forward only", {"scan": "forward"}),
    Variant("bsm-per-order", "scan", "bsm, weights per order", {"scan_weights": "per-order"}),
    Variant("csm-per-order", "scan", "csm, weights per order", {"scan": "csm", "scan_weights": "per-order"}),
    Variant("language-half", "language", "half the blocks", language="language-half"),
    Variant("language-longer", "language", "three times the text in stage 0b", language="language-longer"),
    Variant("clip", "encoder", "contrastive, softmax (CLIP)", encoder="clip"),
    Variant("siglip", "encoder", "contrastive, sigmoid (SigLIP)", encoder="siglip"),
    Variant("after", "picture", "picture after the first question", {"image_place": "after"}),
    Variant("no-stage-1", "stages", "stage 2 alone", align=False),
    Variant("two-epochs", "stages", "stage 2 twice over its data", epochs=2),
    Variant("half-twice", "stages", "half the data, twice", share=0.5, epochs=2),
)  # fmt: skip
AXES = tuple(dict.fromkeys(v.axis for v in VARIANTS if v.axis != "all"))
OPEN = ("picture", "stages")
"""Axes that the paper leaves open; they come after its own."""
BY_NAME = {variant.name: variant for variant in VARIANTS}
DRAW = "draw-"
"""How the names of tasks begin that draw data."""
STAGE_0 = {
    "patches": f"{DRAW}patches",
    "language": f"{DRAW}text",
    "clip": f"{DRAW}pairs",
    "siglip": f"{DRAW}pairs",
    "language-longer": f"{DRAW}text",
    "language-half": f"{DRAW}text",
}
"""Parts, and which data each learns from."""


@dataclass(frozen=True)
class Claim:
    """What the paper says of two variants: that one is `better` than the other on the mean of some benchmarks (all
    where none is named, but for `apart`), or that there is no difference."""

    words: str
    better: str
    worse: str
    benchmarks: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    equal: bool = False


_FOUR = ("textvqa", "mme", "mmbench", "mmvet")
CLAIMS = (
    Claim("2.8b-slimpj beats 2.8b on every benchmark", "language-longer", "baseline"),
    Claim("2.8b-slimpj beats 1.4b on every benchmark", "language-longer", "language-half"),
    Claim("SigLIP beats CLIP on most", "siglip", "clip", apart=("mme",)),
    Claim("CLIP wins MME", "clip", "siglip", ("mme",)),
    Claim("vss-l2 beats vss-mlp on TextVQA, MME, MMBench, MM-Vet", "baseline", "vss-mlp", _FOUR),
    Claim("vss-l2 beats mlp on these", "baseline", "mlp-narrow", _FOUR),
    Claim("the same, with as many parameters", "baseline", "mlp", _FOUR),
    Claim("bsm equals csm on VQAv2", "baseline", "csm", ("vqav2",), equal=True),
    Claim("bsm beats csm on most others", "baseline", "csm", apart=("vqav2",)),
)


@dataclass(frozen=True)
class Study:
    """Where everything is and how much of it there is. `workers`: processes that draw scenes; 0 for none beside.

    OUTPUT/stage0/        tokenizer, encoders and language models, bf16; with results/ all that a later sitting needs
    OUTPUT/results/       one file for each finished run
    OUTPUT/benchmarks/    the eight scene benchmarks
    OUTPUT/drawn/         what runs read, drawn once
    OUTPUT/work/, logs/   runs that are under way, and what every task said
    OUTPUT/claims/        a lock for every task that somebody does
    """

    output: Path
    scale: Scale = FULL
    workers: int = 1
    device: str = "auto"

    def stage0(self, name: str) -> Path:
        return self.output / "stage0" / name

    def result(self, name: str, seed: int) -> Path:
        return self.output / "results" / f"{name}-{seed}.json"

    def work(self, name: str) -> Path:
        return self.output / "work" / name

    def drawn(self, task: str) -> Path:
        return self.output / "drawn" / task.removeprefix(DRAW)

    @property
    def benchmarks(self) -> Path:
        return self.output / "benchmarks"


def encoder_recipe(study: Study, name: str) -> RunConfig:
    """Stage 0 of an encoder: `patches`, `clip` or `siglip`."""
    values: dict[str, Any] = {"model.tokenizer": str(study.stage0(TOKENIZER))}
    if study.scale.vision:
        values["model.vision"] = study.scale.vision
    if name == "patches":
        batch = min(128, study.scale.pictures)
        return _recipe("nano/0a-vision", study, name, study.scale.pictures // batch, batch, values)
    batch = min(256, study.scale.pictures)
    values["model.contrastive"] = {"clip": "softmax", "siglip": "sigmoid"}[name]
    file = str(HERE / "0a-contrastive.yaml")
    return _recipe(file, study, name, study.scale.pictures // batch, batch, values)


def language_recipe(study: Study, name: str) -> RunConfig:
    """Stage 0 of a language model: `language`, or with half the blocks, or on three times the text."""
    blocks = {"language-half": 3}.get(name, 6)
    sizes = {"hidden_size": 256, "num_hidden_layers": blocks, "state_size": 16} | study.scale.language
    steps = study.scale.text * (3 if name == "language-longer" else 1)
    values = {"model.tokenizer": str(study.stage0(TOKENIZER)), "model.language": sizes}
    return _recipe("nano/0b-language", study, name, steps, 2 * study.scale.batch, values)


def align_recipe(study: Study, variant: Variant, seed: int) -> RunConfig:
    """Stage 1 of a run."""
    scale, name = study.scale, f"{variant.name}-{seed}/1-align"
    data = [_scenes(4000 + seed, "caption", scale.align * scale.batch)]
    values = {"model": _parts(study, variant), "data": data, "seed": seed}
    return _recipe("nano/1-align", study, name, scale.align, scale.batch, values)


def instruct_recipe(study: Study, variant: Variant, seed: int) -> RunConfig:
    """Stage 2 of a run: conversations, and a dense description for every five of them, as in nano's own."""
    scale, name = study.scale, f"{variant.name}-{seed}"
    model = {"path": str(study.work(name) / "1-align/model")} if variant.align else _parts(study, variant)
    steps = round(scale.instruct * variant.share)
    size, again = steps * scale.batch, variant.epochs > 1
    described = size // 6
    asked = _scenes(5000 + seed, "conversation", size - described, questions=10, again=again)
    told = [_scenes(6000 + seed, "description", described, again=again)] if described else []
    values = {"model": model, "data": [asked, *told], "seed": seed}
    return _recipe("nano/2-instruct", study, f"{name}/2-instruct", steps * variant.epochs, scale.batch, values)


def align_data(seed: int) -> str:
    """The task that draws what stage 1 reads."""
    return f"{DRAW}align-{seed}"


def instruct_data(variant: Variant, seed: int) -> str:
    """The task that draws what stage 2 reads: one for all variants, but for those with batches of their own."""
    base = VARIANTS[0]
    alike = variant.data == base.data and "image_place" not in variant.model
    return f"{DRAW}instruct-{seed}" if alike else f"{DRAW}instruct-{variant.name}-{seed}"


def drawn_recipe(study: Study, task: str) -> RunConfig:
    """The recipe whose batches a task draws: with fresh parts, as those of stage 0 need not be there yet."""
    name = task.removeprefix(DRAW)
    if name == "patches":
        return encoder_recipe(study, "patches")
    if name == "pairs":
        return encoder_recipe(study, "clip")
    if name == "text":
        return language_recipe(study, "language-longer")  # the others read its first steps
    what, _, seed = name.rpartition("-")
    stage, _, variant = what.partition("-")
    make = align_recipe if stage == "align" else instruct_recipe
    recipe = make(study, BY_NAME[variant or "baseline"], int(seed))
    parts = align_recipe(study, BY_NAME[variant or "baseline"], int(seed)).model
    vision, language = encoder_recipe(study, "patches").model.vision, language_recipe(study, "language").model.language
    return replace(recipe, model=replace(parts, vision=vision, language=language))


def _scenes(seed: int, what: str, size: int, **fields: Any) -> dict[str, Any]:
    """A source of data; nano's recipes use none of these seeds."""
    return {"scenes": {"seed": seed, "split": "train", "what": what} | fields, "size": size}


def _parts(study: Study, variant: Variant) -> dict[str, Any]:
    return {
        "tokenizer": str(study.stage0(TOKENIZER)),
        "vision": str(study.stage0(variant.encoder)),
        "language": str(study.stage0(variant.language)),
        "vision_layer": -1,
    } | variant.model


def _recipe(file: str, study: Study, name: str, steps: int, batch: int, values: dict[str, Any]) -> RunConfig:
    common = {
        "optim.global_batch": batch,
        "optim.micro_batch": batch,
        "optim.max_steps": steps,
        "optim.time_budget": None,
        "workers": 0,  # what is drawn already is read in a fraction of a millisecond
        "device": study.device,
        "checkpoint.every": 1000,
        "logging.every": max(1, steps // 20),
        "logging.tensorboard": False,
    }
    assignments = [f"{key}={json.dumps(value)}" for key, value in (common | values).items()]
    return load_config(file, assignments, output=str(study.work(name)))
