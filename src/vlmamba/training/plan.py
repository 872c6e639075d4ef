"""`vlmamba train --dry-run` and `--overfit-one-batch`: what a recipe means, and whether its loop learns at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch

from vlmamba.data.sources import require_there
from vlmamba.training import build, launch
from vlmamba.training.card import recipe_text
from vlmamba.training.config import ConfigError, RunConfig
from vlmamba.training.estimate import estimate, product_rate
from vlmamba.training.optimizer import set_rates

LEARNED = 0.1
"""Share of its first loss that a batch seen again and again must come down to."""


def dry_run(config: RunConfig, earlier: Mapping[str, RunConfig] | None = None) -> Iterator[str]:
    """The resolved recipe, then parts, memory and time, as lines; nothing is loaded and nothing is written.

    Args:
        earlier: recipes of a pipeline's stages before this one.
    """
    yield recipe_text(config).rstrip()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if config.device == "auto" else config.device.split(":")[0]
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device: {config.device!r} cannot be counted for; use auto, cpu, cuda or cuda:N")
    yield from estimate(config, device, world, earlier).lines(device, product_rate(device), world)
    if config.optim.time_budget is not None:
        yield f"it ends after {config.optim.time_budget:g} minutes, however many of these steps are made by then"
    if config.optim.pack and all(source.scenes is None for source in config.data):
        batch = config.optim.global_batch
        yield f"packed: in whole rows a step holds about {batch} samples; the run's first lines say how many"
    if device == "cpu" and config.device == "auto":
        yield "on one H100 or H200 instead:"
        lines = list(estimate(config, "cuda", world, earlier).lines("cuda", product_rate("cuda"), world))
        yield from (line for line in lines if line.startswith("memory") or "TFLOP a step" in line)


def require_data(config: RunConfig) -> None:
    """ValueError, as the run raises it, if a file or folder of its data is not there."""
    for source in config.data:
        if source.llava is not None:
            require_there(source.llava)


def overfit(config: RunConfig, steps: int = 200) -> Iterator[tuple[int, float]]:
    """Trains on the run's first batch alone, at full rate, and gives step and loss until it is learned by heart.

    Nothing is written. The last loss is below `LEARNED` of the first if the loop works.
    """
    device = launch.pick_device(config.device)
    launch.seed_all(config.seed)
    with build.quiet():
        model, processor = build.build(config.model, config.stage.image_mode)
    step = launch.make_step(model, processor, config, device)
    set_rates(step.optimizer, 1.0)
    feed = launch.make_feed(config, processor, device)
    try:
        batch = next(feed.batches())
    finally:
        feed.close()
    first: float | None = None
    for number in range(1, steps + 1):
        loss, _ = step(batch).read()
        first = first or loss
        yield number, loss
        if loss < LEARNED * first:
            return
