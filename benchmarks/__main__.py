"""Measures everything that can be measured on this machine: `python -m benchmarks`, or `make bench`.

    python -m benchmarks                                   every section, on a GPU if there is one
    python -m benchmarks --only prefill,decode --budget 300
    python -m benchmarks --toy                             tiny shapes: does it run?

The gate comes first: no number is taken while an op or model is wrong. Meanwhile every section is rehearsed in a
process of its own, which compiles its kernels. Then come the numbers that the project aims at, each beside its best
peers, then wider sweeps and other peers, and last what takes a minute a number. Results go to
benchmarks/results/<hardware>.{json,md,png} after every part, so a run that is cut short keeps what it has; a later run
of some sections replaces what it measures of those, and names the commit of what it leaves. Where there is no git, the
environment variable VLMAMBA_COMMIT says which commit is measured.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import gate, machine, plots, rehearsal
from benchmarks.bench import NO_TIME, Bench
from benchmarks.report import LIMITS, OURS, Report
from benchmarks.turns import SECTIONS, TURNS

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if the gate is red or one of our own rows failed; 2 for a section that does not exist."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    possible = [name for name in SECTIONS if options.toy or (name == "cpu") == (device.type == "cpu")]
    chosen = possible if options.only is None else options.only.split(",")
    unknown = [name for name in chosen if name not in possible]
    if unknown:
        where = f"on {device.type}{' with --toy' * options.toy}"
        print(f"no section {unknown[0]!r} {where}; there are {', '.join(possible)}", file=sys.stderr)
        return 2

    turns = [turn for turn in TURNS if turn.section in chosen]
    if options.rehearse:
        return rehearsal.play(turns, device, Path(options.out))

    began = time.monotonic()
    with rehearsal.of(chosen if device.type == "cuda" and not options.toy else []):
        failures = gate.run(device)
    if failures:
        print("the gate is red, nothing is timed:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    about = machine.describe(device) | {"commit": machine.commit(), "date": str(datetime.date.today())}
    report = Report(_path(options, device), about)
    bench = Bench(report, device, options.toy, machine.limits(device, options.toy), options.wall)
    copy, product = bench.limits["copy"], bench.limits["product"]
    report.machine[LIMITS] = f"copy {copy / 1e9:,.0f} GB/s, bf16 product {product / 1e12:.3g} TFLOP/s"
    report.machine["bf16 product"] = machine.rate_is(device)
    print(f"gate green after {time.monotonic() - began:.0f} s; {report.machine[LIMITS]}", flush=True)

    gc.collect()
    gc.freeze()  # what is there now stays: collecting after every row need not look through it
    for i, turn in enumerate(turns):
        left = options.budget - (time.monotonic() - began)
        if left < 3:
            print(f"{turn.section}, {turn.part}: {NO_TIME}")
            turn.skip(bench)
            continue
        turn.take(bench, left * turn.weight / sum(other.weight for other in turns[i:] if other.part == turn.part))
        report.write()
        plots.draw(report.rows, report.path.with_suffix(".png"))
    gc.unfreeze()
    if bench.begun:
        report.end(bench.begun)
        report.write()
    print(f"{time.monotonic() - began:.0f} s; {report.path.with_suffix('.md')}")
    failed = [row for row in report.rows if row.who == OURS and row.note.startswith("failed")]
    for row in failed:
        print(f"{row.section}: {row.case} ({row.mode}): {row.note}", file=sys.stderr)
    return 1 if failed else 0


def _path(options: argparse.Namespace, device: torch.device) -> Path:
    if options.out is not None:
        return Path(options.out)
    if options.toy:
        return Path(tempfile.gettempdir()) / "vlmamba-toy-benchmark"
    name = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", machine.name_of(device).lower()).strip("-")
    return RESULTS / name


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=form)
    parser.add_argument("--only", help=f"sections, comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds for the whole run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to try the program; the numbers mean nothing")
    parser.add_argument("--wall", action="store_true", help="on a CPU: also by the wall clock, on all cores")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)  # see rehearsal.py
    parser.add_argument("--out", help="path of the results without suffix; default benchmarks/results/<hardware>")
    return parser


if __name__ == "__main__":
    sys.exit(main())
