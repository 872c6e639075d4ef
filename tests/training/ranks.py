"""Two processes for the tests of parallel training: started together, they run a list of jobs one after another.

Run by itself (`python ranks.py JOBS.json`, with the variables that torchrun sets) it is one of the processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmamba.training.config import RunConfig, from_mapping


@dataclass
class Job:
    """A run, and where it is told to stop.

    Attributes:
        stop_at: the step after which the last process alone gets SIGTERM; None: the run goes on to its end.
        slow_save: seconds that writing a checkpoint takes longer.
        die_in: the micro-batch, counted from 1, after whose backward pass the process kills itself.
    """

    config: RunConfig
    stop_at: int | None = None
    slow_save: float = 0.0
    die_in: int | None = None


def start(jobs: list[Job], folder: Path, size: int = 1) -> list[subprocess.Popen[bytes]]:
    """Starts `size` processes that run the jobs; each writes to `folder`/rank-N.log."""
    import torch.distributed as dist

    file = folder / "jobs.json"
    file.write_text(json.dumps([vars(job) | {"config": asdict(job.config)} for job in jobs]))
    # The store takes a free port by itself, as torchrun's does, and the processes join it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(size):
        with (folder / f"rank-{rank}.log").open("w") as log:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, __file__, str(file)]
            processes.append(
                subprocess.Popen(command, env=os.environ | shared | own, stdout=log, stderr=subprocess.STDOUT)
            )
    processes[0].store = store  # type: ignore[attr-defined]  # it lives as long as they do
    return processes


def run_jobs(jobs: list[Job], folder: Path, size: int = 2, timeout: float = 150) -> None:
    """Runs the jobs in `size` processes.

    Raises:
        AssertionError: a process failed, or they still run after `timeout` seconds, waiting for each other perhaps.
    """
    processes = start(jobs, folder, size)
    codes: list[Any]
    try:
        codes = [process.wait(timeout) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["they hang"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = (folder / f"rank-{rank}.log" for rank in range(size))
    assert codes == [0] * size, f"{codes}\n" + "\n".join(log.read_text()[-3000:] for log in logs)


def note_ids(step_class: Any) -> Any:
    """Has every step append its sample ids to ids.jsonl in the run's folder, given by the returned cell."""
    original, where = step_class.__call__, {}

    def call(self: Any, micro_batches: list[Any], *arguments: Any) -> Any:
        result = original(self, micro_batches, *arguments)
        with (Path(where["folder"]) / "ids.jsonl").open("a") as handle:
            handle.write(json.dumps([batch.ids for batch in micro_batches]) + "\n")
        return result

    step_class.__call__ = call
    return where


def _main(file: Path) -> None:
    import torch

    from vlmamba.training import checkpoint, run
    from vlmamba.training.parallel import joined
    from vlmamba.training.step import Step
    from vlmamba.training.trainer import Interrupted

    torch.set_num_threads(1)
    where = note_ids(Step)
    original, calls, save = Step.__call__, [], checkpoint.dcp.save
    job: dict[str, Any] = {}

    def call(self: Step, *arguments: Any) -> Any:
        result = original(self, *arguments)
        calls.append(1)
        if len(calls) == job["stop_at"] and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    accumulate, micro_batches = Step._accumulate, []

    def accumulated(self: Step, *arguments: Any) -> Any:
        loss = accumulate(self, *arguments)
        micro_batches.append(1)
        if len(micro_batches) == job["die_in"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    def slow_save(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        time.sleep(job["slow_save"])

    Step.__call__, Step._accumulate, checkpoint.dcp.save = call, accumulated, slow_save
    jobs = json.loads(file.read_text())
    with joined(jobs[0]["config"]["device"]):
        for job in jobs:
            calls.clear()
            where["folder"] = job["config"]["output"]
            try:
                run(from_mapping(RunConfig, job["config"]))
                assert job["stop_at"] is None
            except Interrupted:
                assert job["stop_at"] is not None


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
