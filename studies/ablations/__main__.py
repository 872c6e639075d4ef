"""Trains and measures every run of the study that is not finished, then writes its tables and plots.

python -m studies.ablations --output runs/study [--gpus 2] [--only connector,scan] [--seeds 3] [--minutes 20]
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from studies.ablations.plan import AXES, FULL, TOY, VARIANTS, Study, Variant
from studies.ablations.schedule import Task, do_all

MORE = 5
CLOSE = 2.0
"""Points of all skills together below which a difference gets `MORE` seeds."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The paper's ablations at nano scale; docs/study.md explains.")
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--gpus", type=int, default=None, help="how many; default: all there are, or the CPU")
    parser.add_argument("--side-by-side", type=int, default=1, help="processes a GPU")
    parser.add_argument("--workers", type=int, default=None, help="processes a run that draw scenes; default: by cores")
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
    study = Study(options.output, scale, draw(options, len(gpus)), device)
    chosen = [v for v in VARIANTS if v.axis in axes]
    chosen = [v for v in VARIANTS if v in chosen or v.name == "baseline" or v.name in {c.reference for c in chosen}]
    wrong = []
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


def tasks(chosen: Sequence[Variant], seeds: int) -> list[Task]:
    """In the order of their importance: axis by axis, each after the parts of stage 0 that it is the first to need."""
    ordered = {"prepare": Task("prepare")}
    for axis in dict.fromkeys(variant.axis for variant in chosen):
        for variant in (v for v in chosen if v.axis == axis):
            for part in (variant.encoder, variant.language):
                ordered.setdefault(part, Task(part, ("prepare",)))
        for seed in range(seeds):
            for variant in (v for v in chosen if v.axis == axis):
                name = f"{variant.name}-{seed}"
                ordered[name] = Task(name, ("prepare", variant.encoder, variant.language))
    return list(ordered.values())


def places(options: argparse.Namespace) -> list[int | None]:
    """The GPU of every worker; a toy is played on the CPU."""
    if options.toy:
        return [None]
    import torch

    number = torch.cuda.device_count() if options.gpus is None else options.gpus
    if number > torch.cuda.device_count():
        raise SystemExit(f"--gpus {number}: torch sees {torch.cuda.device_count()}")
    return [gpu for _ in range(options.side_by_side) for gpu in range(number)] or [None]


def draw(options: argparse.Namespace, runs: int) -> int:
    """Processes that draw scenes for each of so many runs side by side."""
    from vlmamba.data.processes import cores

    if options.toy:
        return 0
    return options.workers if options.workers is not None else max(1, min(14, (cores() - runs) // runs))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs under way save their state
    raise SystemExit(main())
