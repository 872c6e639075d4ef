"""The tasks: tokenizer and benchmarks, data, the parts of stage 0, the runs. Each leaves its result whole or not."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from studies.ablations.drawn import LIST, draw, feed_from, order_of
from studies.ablations.measure import measure
from studies.ablations.plan import (
    BY_NAME,
    DRAW,
    STAGE_0,
    TOKENIZER,
    Study,
    align_data,
    align_recipe,
    drawn_recipe,
    encoder_recipe,
    instruct_data,
    instruct_recipe,
    language_recipe,
)
from vlmamba.data.scenes.export import write
from vlmamba.data.scenes.sprites import available_things
from vlmamba.evaluation import TASKS, weights_hash
from vlmamba.evaluation.files import dump_json, write_atomically
from vlmamba.training import launch
from vlmamba.training.metrics import read_metrics
from vlmamba.training.stages import find_pipeline, learn_tokenizer, read_pipeline

PREPARE = "prepare"
TRAINED = "study.json"
"""In a part of stage 0 that the study has trained; none is in a part that was put there."""
BENCHMARK_SEED = 77_001
"""Of the benchmarks' scenes: no recipe uses it."""


def finished(study: Study, task: str) -> bool:
    """Whether a task has left its result."""
    if task == PREPARE:
        return study.stage0(TOKENIZER).is_dir() and study.benchmarks.is_dir()
    if task.startswith(DRAW):
        return (study.drawn(task) / LIST).exists()
    return (study.stage0(task) if task in STAGE_0 else _result(study, task)).exists()


def execute(study: Study, task: str) -> None:
    """Does what is left of a task."""
    if task == PREPARE:
        prepare(study)
    elif task.startswith(DRAW):
        draw(drawn_recipe(study, task), study.drawn(task), study.workers)
    elif task in STAGE_0:
        recipe = (language_recipe if task.startswith("language") else encoder_recipe)(study, task)
        model = launch.run(recipe, feed_from(study.drawn(STAGE_0[task])))
        (model / TRAINED).write_text(dump_json({"steps": recipe.optim.max_steps, "batch": recipe.optim.global_batch}))
        keep(model, study.stage0(task))
        shutil.rmtree(study.work(task))
    else:
        run(study, task)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prepare(study: Study) -> None:
    """The tokenizer, as nano's recipe learns it, and the eight benchmarks."""
    study.stage0(TOKENIZER).parent.mkdir(parents=True, exist_ok=True)
    config = read_pipeline(find_pipeline("nano"), [f"tokenizer.samples={study.scale.samples}"]).tokenizer
    assert config is not None
    learn_tokenizer(config, study.stage0(TOKENIZER))
    if study.benchmarks.is_dir():
        return
    scratch = study.output / ".writing-benchmarks"
    shutil.rmtree(scratch, ignore_errors=True)
    for task in TASKS:
        if task == "pope" and not available_things():
            continue  # without a font of pictures there is nothing that could be there or not
        kind = {"mmvet": "mm-vet"}.get(task, task)
        least = 28 if task == "mme" else 2  # two pictures of each of its sub-tasks
        write(scratch / kind, kind, max(least, study.scale.benchmark), BENCHMARK_SEED, progress=False)
    os.replace(scratch, study.benchmarks)


def keep(model: Path, target: Path) -> None:
    """A part of stage 0, matrices in bf16, as shipped models are; A_log stays float32."""
    scratch = target.with_name(f".writing-{target.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(model, scratch)
    for file in scratch.glob("*.safetensors"):
        tensors = load_file(file)
        halved = {n: t if t.ndim < 2 or n.endswith("A_log") else t.bfloat16() for n, t in tensors.items()}
        save_file(halved, file, {"format": "pt"})
    os.replace(scratch, target)


def run(study: Study, task: str) -> None:
    """Trains a variant by both stages, measures it, and leaves one small file."""
    name, _, number = task.rpartition("-")
    variant, seed, started = BY_NAME[name], int(number), time.perf_counter()
    place, parts = study.work(task), (variant.encoder, variant.language)
    if variant.align:
        launch.run(align_recipe(study, variant, seed), feed_from(study.drawn(align_data(seed))))
    samples = study.drawn(instruct_data(variant, seed))
    model = launch.run(instruct_recipe(study, variant, seed), feed_from(samples))
    trained = time.perf_counter()
    shutil.rmtree(place / "measured", ignore_errors=True)
    found = measure(study, model, place / "measured")
    result = {
        "variant": name,
        "seed": seed,
        "scale": asdict(study.scale),
        "data": order_of(samples),
        "recipe": recipe_hash(study),
        "stage0": {part: weights_hash(study.stage0(part)) for part in parts},
        "given": [part for part in parts if not (study.stage0(part) / TRAINED).exists()],
        "versions": launch.versions(),
        "train_seconds": trained - started,
        "measure_seconds": time.perf_counter() - trained,
        "losses": {
            stage.name: [(line["step"], line["loss"]) for line in read_metrics(stage / "metrics.jsonl")]
            for stage in sorted(place.glob("[12]-*"))
        },
        **found,
    }
    _result(study, task).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(_result(study, task), dump_json(result))
    shutil.rmtree(place)


def recipe_hash(study: Study) -> str:
    """Of what all runs have in common: the baseline's recipes, without places and processes."""
    stages = (make(study, BY_NAME["baseline"], 0) for make in (align_recipe, instruct_recipe))
    kept = [(asdict(s.stage), asdict(s.optim), [asdict(source) for source in s.data]) for s in stages]
    return hashlib.sha256(json.dumps([kept, asdict(study.scale)], sort_keys=True).encode()).hexdigest()[:16]


def results(study: Study) -> list[dict[str, Any]]:
    """All finished runs.

    Raises:
        ValueError: one of another recipe, on other parts of stage 0, or that saw other samples than its reference.
    """
    found = [json.loads(file.read_text()) for file in sorted((study.output / "results").glob("*.json"))]
    by_run = {(row["variant"], row["seed"]): row for row in found}
    parts: dict[str, str] = {}
    for (name, seed), row in by_run.items():
        file, variant = study.result(name, seed), BY_NAME[name]
        if row["recipe"] != found[0]["recipe"]:
            raise ValueError(f"{file}: its recipe is not that of {found[0]['variant']}-{found[0]['seed']}")
        for part, weights in row["stage0"].items():
            if parts.setdefault(part, weights) != weights:
                raise ValueError(f"{file}: stands on another {part} ({weights}) than other runs ({parts[part]})")
        reference = by_run.get((variant.reference, seed))
        alike = variant.data == BY_NAME[variant.reference].data
        if alike and reference is not None and row["data"] != reference["data"]:
            raise ValueError(f"{file}: saw other samples than {variant.reference}, or in another order")
    return found


def _result(study: Study, task: str) -> Path:
    name, _, seed = task.rpartition("-")
    return study.result(name, int(seed))
