"""Evaluation: eight benchmarks scored as their official tools score them, a runner that survives a kill, a report."""

from vlmamba.evaluation.api import Check, check, evaluate, score
from vlmamba.evaluation.judge import Judge
from vlmamba.evaluation.own import OwnData
from vlmamba.evaluation.report import report
from vlmamba.evaluation.results import table, weights_hash
from vlmamba.evaluation.runner import Answerer, ReadsAhead, Request, Shard
from vlmamba.evaluation.task import Options
from vlmamba.evaluation.tasks import TASKS

__all__ = [
    "TASKS",
    "Answerer",
    "Check",
    "Judge",
    "Options",
    "OwnData",
    "ReadsAhead",
    "Request",
    "Shard",
    "check",
    "evaluate",
    "report",
    "score",
    "table",
    "weights_hash",
]
