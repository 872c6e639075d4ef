"""`vlmamba train` and `vlmamba data scenes`."""

from __future__ import annotations

import sys
from pathlib import Path


def train(recipe: str, overrides: list[str] | None, output: str | None) -> None:
    """Runs a recipe or a pipeline; a run that was interrupted goes on where it stopped."""
    from vlmamba.training.config import load_config, recipes_folder

    changes = list(overrides or [])
    for change in changes:
        if "=" not in change:
            raise ValueError(f"{change!r} is not an override; expected KEY=VALUE, such as optim.lr=1e-3")
    folder = output or str(Path("runs") / Path(recipe).with_suffix("").name)
    is_pipeline = any((path / "pipeline.yaml").is_file() for path in (Path(recipe), recipes_folder() / recipe))
    if is_pipeline:
        from vlmamba.training.stages import run_pipeline

        run_pipeline(recipe, folder, changes)
        return
    if output is None and not any(change.startswith("output=") for change in changes):
        changes = [*changes, *([] if _names_output(recipe) else [f"output={folder}"])]
    config = load_config(recipe, changes, **({"output": output} if output else {}))
    from vlmamba.training import run

    run(config)


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
