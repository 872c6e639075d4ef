"""The eight benchmarks, by name, in the order of the paper's table."""

from __future__ import annotations

from vlmamba.evaluation.task import Task
from vlmamba.evaluation.tasks.gqa import GQA
from vlmamba.evaluation.tasks.mmbench import MMBench
from vlmamba.evaluation.tasks.mme import MME
from vlmamba.evaluation.tasks.mmvet import MMVet
from vlmamba.evaluation.tasks.pope import POPE
from vlmamba.evaluation.tasks.scienceqa import ScienceQA
from vlmamba.evaluation.tasks.textvqa import TextVQA
from vlmamba.evaluation.tasks.vqav2 import VQAv2

TASKS: dict[str, Task] = {
    task.name: task for task in (VQAv2(), GQA(), ScienceQA(), TextVQA(), POPE(), MME(), MMBench(), MMVet())
}


def _folded(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


_KNOWN_AS = {_folded(name): task for task in TASKS.values() for name in (task.name, task.title, *task.folders)}


def get_task(name: str) -> Task:
    """The benchmark called `name`, whatever the case, '-' and '_', by its title as well ("MM-Vet", "scienceqa_img");
    ValueError that lists them all when there is none."""
    if _folded(name) not in _KNOWN_AS:
        raise ValueError(f"there is no task {name!r}: there are {', '.join(TASKS)}")
    return _KNOWN_AS[_folded(name)]
