"""Measures everything that can be measured on this machine: `python -m benchmarks`, or `make bench`.

    python -m benchmarks                                   every section, on a GPU if there is one
    python -m benchmarks --only prefill,decode --budget 300
    python -m benchmarks --toy                             tiny shapes: does it run?

The gate comes first: no number is taken while an op or model is wrong. Results go to
benchmarks/results/<hardware>.{json,md,png} after every section, so a run that is cut short keeps what it has; a later
run of some sections replaces those alone.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import gate, machine, plots
from benchmarks.bench import Bench
from benchmarks.report import Report

# Section: its modules, its share of the budget. In the order of how much a reader wants to know them.
SECTIONS: dict[str, tuple[tuple[str, ...], float]] = {
    "ops": (("ops",), 2.0),
    "decode": (("decode", "peer_decode"), 4.0),
    "prefill": (("prefill",), 5.0),
    "vlm": (("vlm",), 4.0),
    "evaluation": (("evaluation",), 4.0),
    "training": (("training",), 4.0),
    "memory": (("memory",), 3.0),
    "block": (("block",), 1.5),
    "cpu": (("cpu",), 5.0),
}
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

    began = time.monotonic()
    failures = gate.run(device)
    if failures:
        print("the gate is red, nothing is timed:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    report = Report(_path(options, device), machine.describe(device))
    bench = Bench(report, device, options.toy, machine.limits(device, options.toy), options.wall)
    copy, product = bench.limits["copy"], bench.limits["product"]
    report.machine["measured limits"] = f"copy {copy / 1e9:,.0f} GB/s, bf16 product {product / 1e12:.3g} TFLOP/s"
    print(f"gate green; {report.machine['measured limits']}", flush=True)

    for i, name in enumerate(chosen):
        modules, weight = SECTIONS[name]
        left = options.budget - (time.monotonic() - began)
        share = left * weight / sum(SECTIONS[other][1] for other in chosen[i:])
        if left < 3:
            print(f"{name}: no time left")
            continue
        _section(bench, name, modules, share)
        report.write()
        plots.draw(report.rows, report.path.with_suffix(".png"))
    print(f"{time.monotonic() - began:.0f} s; {report.path.with_suffix('.md')}")
    failed = [row for row in report.rows if row.who == "vlmamba" and row.note.startswith("failed")]
    for row in failed:
        print(f"{row.section}: {row.case} ({row.mode}): {row.note}", file=sys.stderr)
    return 1 if failed else 0


def _section(bench: Bench, name: str, modules: tuple[str, ...], seconds: float) -> None:
    before = time.monotonic()
    bench.begin(name, seconds)
    about = []
    for module in modules:
        loaded = importlib.import_module(f"benchmarks.{module}")
        text = inspect.cleandoc(loaded.__doc__ or "").split("\n\nShapes")[0].split("\nLetters")[0]
        about.append(re.sub(r"\n\n(    python.*\n)+", "\n", text))
        loaded.run(bench)
        bench.free()
    bench.report.about[name] = "\n\n".join(about)
    bench.report.seconds[name] = round(time.monotonic() - before, 1)


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
    parser.add_argument("--out", help="path of the results without suffix; default benchmarks/results/<hardware>")
    return parser


if __name__ == "__main__":
    sys.exit(main())
