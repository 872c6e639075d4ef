"""The training table of a machine with two GPUs, in one command: every row in processes of its own.

    python studies/train_on_gpus.py --out benchmarks/results
    python studies/train_on_gpus.py --toy --out out        # all of it on a CPU, in miniature

All processes are started at once and wait, with everything imported, for their turn; rows run one after another, alone.
A row that fails or takes too long is reported as such; JSON and table are written anew after each one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent


@dataclass
class Row:
    """A row of the table: a script in so many processes, and the seconds that it may take."""

    name: str
    processes: int
    options: str
    limit: float = 90
    script: str = "train_full_size.py"
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)


ROWS = [
    # The loader is 24 micro-batches ahead (8 workers, 3 each), 12 steps: only a longer run shows whether it keeps pace.
    Row("stage 1", 1, "--stage 1 --steps 30", 150),  # the first one compiles the kernels for all
    Row("stage 2", 1, "--stage 2 --steps 30", 120),
    Row("equality", 2, "", 100, "train_equality.py"),
    Row("stage 1, DDP", 2, "--stage 1 --parallel ddp"),
    # What the gradients' buckets take beside the activations is made up for by a tenth of the blocks.
    Row("stage 2, DDP", 2, "--stage 2 --parallel ddp --recompute 0.1"),
    Row("stage 2, FSDP2", 2, "--stage 2 --parallel fsdp"),
    Row(
        "7b, stage 2, FSDP2", 2,
        "--stage 2 --size 7b --parallel fsdp --micro-batch 8 --accumulate 1 --steps 10 --recompute 0.5 --resume", 240,
    ),
    Row("stage 2, all recomputed", 1, "--stage 2 --recompute 1"),
    Row("stage 2, compiled", 1, "--stage 2 --compile", 150),
]  # fmt: skip
USUAL = 7
"""The rest of the rows is run where asked for by name."""


def main() -> None:
    options = parse()
    chosen = [row for row in ROWS if row.name in options.rows]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as own:
        folder = Path(own)
        for row in chosen:
            start(row, folder, options)
        try:
            make_data(folder, options.toy)
            print(f"files made after {time.monotonic() - began:.0f} s", flush=True)
            for row in chosen:
                for _ in range(2):
                    limit = min(row.limit, options.seconds - (time.monotonic() - began))
                    found = let_run(row, folder, limit)
                    note(row, found, options)
                    if not found.pop("out_of_memory", False):
                        break
                    row.options += " --recompute 0.25"  # once more, thriftier
                    row.running.clear()
                    start(row, folder, options)
                print(f"{time.monotonic() - began:.0f} s in all", flush=True)
        finally:
            for row in chosen:
                end(row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The training table of a machine with two GPUs.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rows", default=None, help=f"semicolons between them: {'; '.join(row.name for row in ROWS)}")
    parser.add_argument("--seconds", type=float, default=570, help="after which no row goes on")
    parser.add_argument("--toy", action="store_true", help="on the CPU, in miniature")
    options = parser.parse_args()
    known = [row.name for row in ROWS]
    options.rows = [r.strip() for r in options.rows.split(";")] if options.rows else known[:USUAL]
    unknown = sorted(set(options.rows) - set(known))
    if unknown:
        parser.error(f"--rows: {unknown[0]!r} is none of {'; '.join(known)}")
    return options


def make_data(folder: Path, toy: bool) -> None:
    from train_full_size import make_files

    make_files(folder / "data", 16 if toy else 384, toy)


def start(row: Row, folder: Path, options: argparse.Namespace) -> None:
    """Starts a row's processes; they import what they need and wait."""
    common = ["--data", str(folder / "data"), "--json", str(file_of(row, folder)), "--wait"]
    if row.script == "train_full_size.py":
        common += ["--scratch", str(roomiest(folder))] + ["--toy"] * options.toy
    common += ["--device", "cpu"] * options.toy
    shared = {
        "WORLD_SIZE": str(row.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        # Rows of many lengths would cut the memory into pieces that fit nothing.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "OMP_NUM_THREADS": "1" if options.toy else "4",
    }
    for rank in range(row.processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(HERE / row.script), *row.options.split(), *common]
        with log_of(row, rank, folder).open("wb") as log:
            process = subprocess.Popen(
                command, env=os.environ | shared | own, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        row.running.append(process)


def let_run(row: Row, folder: Path, limit: float) -> dict[str, Any]:
    """Gives a row its turn; what it found, and what went wrong."""
    began = time.monotonic()
    codes: list[int | str] = []
    for process in row.running:
        pipe: IO[bytes] | None = process.stdin
        try:
            if pipe is not None:
                pipe.write(b"\n")
                pipe.close()
        except BrokenPipeError:
            codes.append("died before its turn")
    for process in row.running:
        left = began + limit - time.monotonic()
        try:
            codes.append(process.wait(max(0.1, left)))
        except subprocess.TimeoutExpired:
            codes.append(f"stopped after {limit:.0f} s")
            end(row)  # the others would wait for it
    file = file_of(row, folder)
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    found |= {"row": row.name, "processes": row.processes, "row_seconds": round(time.monotonic() - began, 1)}
    if any(codes):
        tails = [log_of(row, rank, folder).read_text(errors="replace")[-2500:] for rank in range(row.processes)]
        print(f"{row.name}: {codes}\n" + "\n---\n".join(tails), flush=True)
        found["problem"] = f"{codes}: {last_line(tails[0])}"
        found["out_of_memory"] = any("OutOfMemoryError" in tail for tail in tails)
    return found


def note(row: Row, found: dict[str, Any], options: argparse.Namespace) -> None:
    """Puts a row into the JSON, in place of an earlier one, and writes the table."""
    device = str(found.get("device", "")).lower().replace(" ", "-")
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"training-{device}" if device else next((f.stem for f in options.out.glob("training-*.json")), "training")
    file = options.out / f"{stem}.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    rows = [*(r for r in rows if r["row"] != row.name), found]
    order = [r.name for r in ROWS]
    rows.sort(key=lambda r: order.index(r["row"]))
    file.write_text(json.dumps(rows, indent=1) + "\n")
    file.with_suffix(".md").write_text(table(rows))
    print(json.dumps({k: v for k, v in found.items() if k not in ("what", "loss_and_norm")}), flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """The results for people to read."""
    timed = [row for row in rows if "step_ms" in row]
    first = timed[0] if timed else {}
    lines = [
        f"# Training, {first.get('device', '?')}", "",
        f"torch {first.get('torch', '?')}. One command: `python studies/train_on_gpus.py`. {origin(rows)}", "",
        f"bf16 product rate: {rates_of(timed)}, measured before each row"
        f"{': ' + first['product_rate_is'] if 'product_rate_is' in first else ''}.", "",
        EXPLANATION, "",
        "| row | GPUs | real tokens/s | images/s | of the product rate | step ms, median (quartiles) | peak GiB | "
        "dry run GiB | wait for data | padding |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line_of(row) for row in timed), "",
    ]  # fmt: skip
    for row in rows:
        if "resume" in row:
            lines += [resumed(row), ""]
        if "differences" in row:
            largest = "; ".join(f"{name} {value:.1e}" for name, value in row["differences"].items())
            lines += [f"Largest relative difference from one process, float32, {row['device']}: {largest}.", ""]
        if "problem" in row:
            lines += [f"{row['row']}: did not finish. `{row['problem']}`", ""]
    return "\n".join(lines)


def origin(rows: list[dict[str, Any]]) -> str:
    """Which commit the rows were made from, and when."""
    made: dict[str, list[str]] = {}
    for row in rows:
        if "commit" in row:
            made.setdefault(f"{row['commit']}, {row['date']}", []).append(row["row"])
    if len(made) < 2:
        return "".join(f"Commit {run}." for run in made)
    return " ".join(f"Commit {run}: {'; '.join(names)}." for run, names in made.items())


def rates_of(timed: list[dict[str, Any]]) -> str:
    rates = [row["product_rate_tflops"] for row in timed] or [0.0]
    low, high = f"{min(rates):.3g}", f"{max(rates):.3g}"
    return f"{low} TFLOP/s" if low == high else f"{low} to {high} TFLOP/s"


EXPLANATION = """\
Random weights; SigLIP-SO400M at 384 px, vss-l2 over bsm, JPEG files of 640 px read, decoded and packed into rows of
8192 tokens by the trainer's own loader. A step is two micro-batches of 16K tokens on each GPU (7b: one of 8K), with
clipping and AdamW; weights, gradients and moments are float32.

Share of the product rate: model arithmetic alone, over real tokens (padding does not count), against the rate just
measured. Forward 2 FLOP a parameter and token; 2 more where gradients pass through on their way to what learns; 2 more
where parameters learn. So 6 for what is trained; 4 for the frozen language model of stage 1, through which the
connector gets its gradients; 2 for the frozen encoder, by its patches. What is computed a second time to save memory
does not count, nor do convolution and scan."""


def line_of(row: dict[str, Any]) -> str:
    times = sorted(row["step_ms"])
    quarter = len(times) // 4
    peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    return (
        f"| {row['row']} | {row['processes']} | {row['tokens_per_second']:,.0f} | {row['images_per_second']:.1f} "
        f"| {row['share_of_product_rate']:.1%} "
        f"| {statistics.median(times):,.0f} ({times[quarter]:,.0f} to {times[-1 - quarter]:,.0f}) "
        f"| {peak} | {row['dry_run_gib']:.1f} | {row['data_wait']:.1%} | {row['padding']:.1%} |"
    )


def resumed(row: dict[str, Any]) -> str:
    of = row["resume"]
    same = "the same loss" if of["same_loss"] else f"loss {of['again'][0]} where it was {of['loss_and_norm'][0]}"
    steps = len(row["step_ms"]) + 2
    return (
        f"{row['row']}: {steps} steps, then a save of {of['gigabytes']:.0f} GB (training stood {of['copied_s']:.0f} s; "
        f"written and hashed in the background after {of['written_s']:.0f} s), checked and read in "
        f"{of['loaded_s']:.0f} s; the step after it, made again: {same}, gradient norm within "
        f"{of['norm_differs_by']:.1e}."
    )


def end(row: Row) -> None:
    for process in row.running:
        if process.poll() is None:
            process.kill()
        process.wait()


def file_of(row: Row, folder: Path) -> Path:
    return folder / f"{row.name.replace(' ', '-')}.json"


def log_of(row: Row, rank: int, folder: Path) -> Path:
    return folder / f"{row.name.replace(' ', '-')}-{rank}.log"


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was said"


def roomiest(folder: Path) -> Path:
    """Where a large checkpoint goes: memory, if it has the room, else the disk."""
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.is_dir() else 0
    return shared if room > max(100e9, shutil.disk_usage(folder).free) else folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
