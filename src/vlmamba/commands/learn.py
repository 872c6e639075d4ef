"""`vlmamba train` and `vlmamba data scenes`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def train(
    words: list[str] | None,
    config: str | None,
    output: str | None,
    dry_run: bool = False,
    overfit_one_batch: bool = False,
) -> int:
    """Runs a recipe or a pipeline; a run that was interrupted goes on where it stopped.

    Args:
        words: the recipe, unless `config` names it, then overrides.
    """
    from vlmamba.training.config import PIPELINE_FILE, load_config, recipes_folder

    recipe, changes = _sorted_out(list(words or []), config)
    folder = output or str(Path("runs") / Path(recipe).resolve().name.removesuffix(".yaml"))
    if any((path / PIPELINE_FILE).is_file() for path in (Path(recipe), recipes_folder() / recipe)):
        return _train_pipeline(recipe, folder, changes, dry_run, overfit_one_batch)
    if output is None and not any(change.startswith("output=") for change in changes):
        changes = [*changes, *([] if _names_output(recipe) else [f"output={folder}"])]
    asked = load_config(recipe, changes, **({"output": output} if output else {}))
    if dry_run:
        from vlmamba.training.plan import dry_run as plan
        from vlmamba.training.plan import require_data

        print("\n".join(plan(asked)), flush=True)
        require_data(asked)
    elif overfit_one_batch:
        return _overfit(asked)
    else:
        from vlmamba.training import run

        run(asked)
    return 0


def _sorted_out(words: list[str], config: str | None) -> tuple[str, list[str]]:
    """The recipe and the overrides."""
    recipe = config or (words.pop(0) if words and "=" not in words[0] else None)
    if recipe is None:
        raise ValueError("no recipe was named; expected a YAML file or a shipped one, such as finetune/cpu or nano")
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word!r} is not an override; expected KEY=VALUE, such as stage.connector.lr=1e-3")
    return recipe, words


def _train_pipeline(recipe: str, folder: str, changes: list[str], dry_run: bool, overfit: bool) -> int:
    from vlmamba.training.stages import plan_pipeline, run_pipeline

    if overfit:
        raise ValueError(f"--overfit-one-batch: takes one recipe; {recipe} is a pipeline")
    if dry_run:
        for line in plan_pipeline(recipe, folder, changes):
            print(line, flush=True)
    else:
        run_pipeline(recipe, folder, changes)
    return 0


def _overfit(config: Any) -> int:
    from vlmamba.training.plan import LEARNED, overfit

    losses = []
    for step, loss in overfit(config):
        losses.append(loss)
        if step == 1 or step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}", flush=True)
    learned = losses[-1] < LEARNED * losses[0]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {len(losses)} steps: {'learned' if learned else 'NOT learned'}")
    return 0 if learned else 1


def _names_output(recipe: str) -> bool:
    from vlmamba.training.config import find_recipe

    return any(line.startswith("output:") for line in find_recipe(recipe).read_text(encoding="utf-8").splitlines())


def scenes(output: str, kind: str, count: int, seed: int, size: int, split: str | None) -> None:
    """Draws scenes and writes them, with captions and questions, as training or benchmark files."""
    from vlmamba.data.scenes.export import write
    from vlmamba.data.scenes.sprites import emoji_font

    if emoji_font() is None:
        print("no emoji font: scenes hold shapes and words, but no things (see vlmamba info)", file=sys.stderr)
    print(write(output, kind, count, seed, size=size, split=split, progress=sys.stderr.isatty()))
