"""A pipeline: stages one after another, each a recipe, each taking what it needs from those before it.

OUTPUT/tokenizer/     learned first, where the pipeline asks for it
OUTPUT/<stage>/       a run folder for every stage
OUTPUT/model/         the last stage's model, in the dtype to be shipped
OUTPUT/curves.svg, pipeline.json
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vlmamba.data.scenes import World
from vlmamba.data.scenes.question import FOUND, LETTER, SHORT
from vlmamba.data.scenes.vocabulary import THINGS, plural
from vlmamba.models.processor import VLMambaProcessor
from vlmamba.models.template import SYSTEM
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import build
from vlmamba.training.config import (
    PIPELINE_FILE,
    ConfigError,
    PipelineConfig,
    RunConfig,
    TokenizerConfig,
    load_config,
    parse,
    recipes_folder,
)
from vlmamba.training.curve import draw_curves
from vlmamba.training.launch import run
from vlmamba.training.metrics import read_metrics
from vlmamba.training.parallel import joined
from vlmamba.training.plan import dry_run, require_data
from vlmamba.training.tokenizer import train_tokenizer

TOKENIZER = "tokenizer"


def run_pipeline(name: str | Path, output: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Runs every stage that is not finished and returns the final model's folder.

    Args:
        name: a folder with a pipeline.yaml, or the name of a shipped one (`nano`).
        output: where all run folders go.
        overrides: dotted assignments for every stage, or for one: `2-instruct.optim.max_steps=100`. Those that begin
            with `tokenizer.` or `export` are the pipeline's own.

    Raises:
        ConfigError: as `run`; all recipes are read before the first stage starts.
    """
    folder, output = find_pipeline(name), Path(output)
    config = read_pipeline(folder, overrides)
    recipes = [stage_config(folder, config, stage, output, overrides) for stage in config.stages]
    with joined(recipes[0].device) as world:
        if config.tokenizer is not None:
            learned = config.tokenizer
            world.from_main(lambda: learn_tokenizer(learned, output / TOKENIZER))
        for recipe in recipes:  # what the last stage lacks is said before the first one takes its hours
            if not (Path(recipe.output) / build.MODEL_FOLDER).is_dir():
                require_data(recipe)
        for stage, recipe in zip(config.stages, recipes, strict=True):
            if world.is_main:
                print(f"stage {stage}", flush=True)
            run(replace(recipe, model=build.resolve(recipe.model, output)))
        world.from_main(lambda: finish_pipeline(output, config))
    return output / build.MODEL_FOLDER


def finish_pipeline(output: Path, config: PipelineConfig) -> None:
    """The curves of all stages, and the model to be shipped."""
    summarise(output, config)
    export(output / config.stages[-1] / build.MODEL_FOLDER, output / build.MODEL_FOLDER, config)


def plan_pipeline(name: str | Path, output: str | Path, overrides: Sequence[str] = ()) -> Iterator[str]:
    """What every stage would be and take, as lines; nothing is loaded or written.

    Raises:
        ValueError: after the last line, if data of a stage are not there.
    """
    folder = find_pipeline(name)
    config = read_pipeline(folder, overrides)
    earlier: dict[str, RunConfig] = {}
    for stage in config.stages:
        recipe = stage_config(folder, config, stage, Path(output), overrides)
        yield f"# stage {stage}"
        yield from dry_run(recipe, earlier)
        earlier[stage] = recipe
    for recipe in earlier.values():
        require_data(recipe)


def find_pipeline(name: str | Path) -> Path:
    """The folder of a pipeline."""
    for folder in (Path(name), recipes_folder() / name):
        if (folder / PIPELINE_FILE).is_file():
            return folder
    shipped = sorted(p.parent.name for p in recipes_folder().glob(f"*/{PIPELINE_FILE}"))
    raise ConfigError(f"{name}: no folder with a {PIPELINE_FILE}; shipped pipelines: {', '.join(shipped)}")


def read_pipeline(folder: Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The pipeline's own file, with the overrides that concern it."""
    return parse(PipelineConfig, folder / PIPELINE_FILE, [o for o in overrides if _is_own(o)])


def stage_config(
    folder: Path, config: PipelineConfig, stage: str, output: Path, overrides: Sequence[str] = ()
) -> RunConfig:
    """One stage's recipe, with the overrides for all stages and for this one. Where a stage goes on with the model of
    an earlier one, how that model is made has been said there: overrides of `model.` for all stages are left out."""
    given = [override.removeprefix("--") for override in (*config.overrides, *overrides) if not _is_own(override)]
    file, run_folder = folder / config.recipes / f"{stage}.yaml", str(output / stage)
    own = {override: override.removeprefix(f"{stage}.") for override in given if override.startswith(f"{stage}.")}
    made = (load_config(file, [*own.values()], output=run_folder).model.path or "").startswith(build.STAGE)
    elsewhere = tuple(f"{other}." for other in config.stages if other != stage) + (("model.",) if made else ())
    return load_config(file, [own.get(o, o) for o in given if not o.startswith(elsewhere)], output=run_folder)


def learn_tokenizer(config: TokenizerConfig, folder: Path) -> None:
    """Learns the tokenizer, unless it is there."""
    if (folder / "tokenizer.json").is_file():
        return
    started = time.perf_counter()
    # Each plural is rare, all of them are not: spelled, they would be what counting most often fails on.
    plurals = map(plural, THINGS)
    tokenizer = train_tokenizer(_texts(config), config.vocab_size, config.min_share, plurals)
    scratch = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    tokenizer.save_pretrained(scratch)
    os.replace(scratch, folder)
    print(f"tokenizer of {len(tokenizer)} entries learned in {time.perf_counter() - started:.0f} s", flush=True)


def _texts(config: TokenizerConfig) -> Iterator[str]:
    """Scene texts with their questions also as users begin them, and now and then the words of the template."""
    world = World(config.scenes.seed, config.scenes.split)
    for index in range(config.samples):
        text = world.text(index)
        asked = re.findall(r"^question: (.+?)(?: answer: .*)?$", text, re.MULTILINE)
        # At a line's start and with a capital a word is another token than within a sentence.
        yield "\n".join([text, *asked, *(question[0].upper() + question[1:] for question in asked)])
        if index % 20 == 0:
            yield f"{SYSTEM} USER: {FOUND}\n{SHORT}{LETTER} ASSISTANT: "


def export(source: Path, target: Path, config: PipelineConfig) -> Path:
    """The model in the dtype to be shipped (A_log, D and dt bias stay float32), with processor and card.

    Raises:
        ConfigError: it takes more than `export_size_limit` MB.
    """
    scratch = target.with_name(f".writing-{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    with build.quiet():
        model = VLMambaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        model.to(getattr(torch, config.export_dtype)).save_pretrained(scratch)
    VLMambaProcessor.from_pretrained(source).save_pretrained(scratch)
    shutil.copy(source / "README.md", scratch)
    size = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file()) / 1e6
    if config.export_size_limit and size > config.export_size_limit:
        raise ConfigError(f"{source}: takes {size:.1f} MB exported; export_size_limit is {config.export_size_limit:g}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
    print(f"{target}: {size:.1f} MB", flush=True)
    return target


def summarise(output: Path, config: PipelineConfig) -> None:
    """One picture of all loss curves, and time and final loss of every stage."""
    metrics = {stage: read_metrics(output / stage / "metrics.jsonl") for stage in config.stages}
    draw_curves(metrics, output / "curves.svg")
    rows = {stage: lines[-1] for stage, lines in metrics.items() if lines}
    (output / "pipeline.json").write_text(json.dumps(rows, indent=1))


def _is_own(override: str) -> bool:
    """Whether an override concerns pipeline.yaml itself."""
    return override.removeprefix("--").startswith(("tokenizer.", "export_"))
