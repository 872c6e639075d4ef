"""Two processes for the tests of parallel training: started together, they run a list of jobs one after another.

Run by itself (`python ranks.py JOBS.json`, with the variables that torchrun sets) it is one of the processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmamba.training.config import RunConfig, from_mapping, to_mapping


@dataclass
class Job:
    """A run, and where it is told to stop.

    Attributes:
        stop_at: the step after which one process alone gets SIGTERM; None: the run goes on to its end.
    """

    config: RunConfig
    stop_at: int | None = None


def run_jobs(jobs: list[Job], folder: Path, size: int = 2, timeout: float = 150) -> None:
    """Runs the jobs in `size` processes.

    Raises:
        AssertionError: a process failed, or they still run after `timeout` seconds, waiting for each other perhaps.
    """
    import torch.distributed as dist

    file = folder / "jobs.json"
    file.write_text(json.dumps([{"config": to_mapping(job.config), "stop_at": job.stop_at} for job in jobs]))
    # The store takes a free port by itself, as torchrun's does, and the processes join it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, __file__, str(file)]
    logs = [folder / f"rank-{rank}.log" for rank in range(size)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank].open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(size)
    ]
    try:
        codes = [process.wait(timeout) for process in processes]
    except subprocess.TimeoutExpired:
        codes = ["hangs"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * size, f"{codes}\n" + "\n".join(log.read_text()[-3000:] for log in logs)


def _main(file: Path) -> None:
    import torch

    from vlmamba.training import run
    from vlmamba.training.parallel import joined
    from vlmamba.training.step import Step
    from vlmamba.training.trainer import Interrupted

    torch.set_num_threads(1)
    original, calls = Step.__call__, []
    job: dict[str, Any] = {}

    def call(self: Step, *arguments: Any) -> Any:
        result = original(self, *arguments)
        calls.append(1)
        if len(calls) == job["stop_at"] and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Step.__call__ = call
    with joined("cpu"):
        for job in json.loads(file.read_text()):
            calls.clear()
            try:
                run(from_mapping(RunConfig, job["config"]))
                assert job["stop_at"] is None
            except Interrupted:
                assert job["stop_at"] is not None


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
