"""Trains and measures every run of the study that is not finished, then writes its tables and plots.

python -m studies.ablations --output runs/study [--draw-only] [--gpus 0,1] [--only connector,scan] [--minutes 20]
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from studies.ablations.plan import (
    AXES,
    DRAW,
    FULL,
    OPEN,
    STAGE_0,
    TOY,
    VARIANTS,
    Study,
    Variant,
    align_data,
    instruct_data,
)
from studies.ablations.schedule import Task, do_all

MORE = 5
CLOSE = 2.0
"""Points of all skills together below which a difference gets `MORE` seeds."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The paper's ablations at nano scale; docs/study.md explains.")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--gpus", default=None, help="their numbers, by commas; default: all there are, or the CPU")
    parser.add_argument("--side-by-side", type=int, default=1, help="processes a GPU")
    parser.add_argument("--workers", type=int, default=None, help="processes that draw scenes; default: one a core")
    parser.add_argument("--draw-only", action="store_true", help="benchmarks and data, for which it takes no GPU")
    parser.add_argument("--only", default=",".join(AXES), help=f"axes, by commas: {', '.join(AXES)}")
    parser.add_argument("--seeds", type=int, default=3, help=f"a run; {MORE} where a gap is below {CLOSE:g} points")
    parser.add_argument("--minutes", type=float, default=None, help="that this sitting may take")
    parser.add_argument("--report", type=Path, default=None, help="folder for tables and plots; default: the output's")
    parser.add_argument("--toy", action="store_true", help="all of it in a minute on a CPU; the numbers mean nothing")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    axes = [name.strip() for name in options.only.split(",")]
    if unknown := sorted(set(axes) - set(AXES)):
        parser.error(f"--only: {', '.join(unknown)} unknown; the axes are {', '.join(AXES)}")
    if options.seeds < 2 and not options.toy:
        parser.error(f"--seeds: is {options.seeds}; a standard error takes two")
    begun = time.monotonic()
    deadline = None if options.minutes is None else begun + 60 * options.minutes
    gpus = places(options)
    scale, device = (TOY, "cpu") if options.toy else (FULL, "auto")
    study = Study(options.output, scale, processes(options), device)
    chosen = [v for v in VARIANTS if v.axis in axes]
    chosen = [v for v in VARIANTS if v in chosen or v.name == "baseline" or v.name in {c.reference for c in chosen}]
    wrong = []
    if options.draw_only:
        return draw(study, chosen, options.seeds, deadline)
    if not options.report_only:
        wrong = train(study, chosen, options.seeds, gpus, deadline, 0 if options.toy else MORE)
    from studies.ablations.report import write
    from studies.ablations.work import results

    print(write(results(study), options.report or study.output, toy=options.toy))
    if wrong:
        print(f"went wrong: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


def train(
    study: Study,
    chosen: Sequence[Variant],
    seeds: int,
    gpus: Sequence[int | None],
    deadline: float | None,
    more: int,
) -> list[str]:
    """All that is left of stage 0 and of the runs, then further seeds where differences are small."""
    from studies.ablations.report import close
    from studies.ablations.work import finished, results

    def done(task: str) -> bool:
        return finished(study, task)

    wrong = do_all(study, tasks(chosen, seeds), done, gpus, deadline)
    if wrong or more <= seeds or not all(done(task.name) for task in tasks(chosen, seeds)):
        return wrong
    names = close(results(study), CLOSE)
    again = [v for v in chosen if v.name in names]
    references = {v.reference for v in again}
    again = [v for v in chosen if v in again or v.name in references]
    if again:
        print(f"{more} seeds for differences below {CLOSE:g} points: {', '.join(v.name for v in again)}", flush=True)
    return do_all(study, tasks(again, more), done, gpus, deadline)


def draw(study: Study, chosen: Sequence[Variant], seeds: int, deadline: float | None) -> int:
    """All that needs no GPU; the exit code. Data for a part of stage 0 that may yet be given come last."""
    from studies.ablations.work import PREPARE, finished

    every = tasks(chosen, seeds)

    def done(task: str) -> bool:
        return finished(study, task) or not any(task in t.needs and not finished(study, t.name) for t in every)

    drawing = [Task(task.name, task.needs) for task in every if task.name.startswith((PREPARE, DRAW))]
    drawing.sort(key=lambda task: task.name == STAGE_0["patches"])
    return int(bool(do_all(study, drawing, done, [None], deadline)))


def tasks(chosen: Sequence[Variant], seeds: int) -> list[Task]:
    """In the order of their importance: the paper's axes before those that it leaves open; of these the parts of stage
    0, then every run's first seed, then the second; each task after what it needs."""
    ordered = {"prepare": Task("prepare")}

    def add(name: str, *data: str, parts: Sequence[str] = ()) -> None:
        for one in data:
            ordered.setdefault(one, Task(one, ("prepare",), for_others=True))
        ordered.setdefault(name, Task(name, ("prepare", *parts, *data)))

    for of_paper in (True, False):
        variants = [v for v in chosen if (v.axis not in OPEN) is of_paper]
        for part in (p for p in STAGE_0 if any(p in (v.encoder, v.language) for v in variants)):
            add(part, STAGE_0[part])
        for seed in range(seeds):
            for v in variants:
                data = (align_data(seed), instruct_data(v, seed)) if v.align else (instruct_data(v, seed),)
                add(f"{v.name}-{seed}", *data, parts=(v.encoder, v.language))
    return list(ordered.values())


def places(options: argparse.Namespace) -> list[int | None]:
    """The GPU of every worker; a toy is played on the CPU, and drawing needs none."""
    if options.toy or options.draw_only or options.report_only:
        return [None]
    import torch

    there = range(torch.cuda.device_count())
    given = there if options.gpus is None else [int(gpu) for gpu in options.gpus.split(",")]
    if wrong := sorted(set(given) - set(there)):
        raise SystemExit(f"--gpus: {wrong[0]} is none of the {len(there)} GPUs that torch sees, counted from 0")
    return [gpu for _ in range(options.side_by_side) for gpu in given] or [None]


def processes(options: argparse.Namespace) -> int:
    """That draw scenes; a toy draws in its own."""
    from vlmamba.data.processes import cores

    if options.toy:
        return 0
    return options.workers if options.workers is not None else cores()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs under way save their state
    raise SystemExit(main())
