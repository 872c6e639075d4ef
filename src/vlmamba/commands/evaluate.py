"""`vlmamba eval`, `vlmamba score` and `vlmamba report`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmamba.commands.answerer import ModelAnswerer
    from vlmamba.commands.load import Loaded
    from vlmamba.evaluation.runner import Shard
    from vlmamba.evaluation.task import Options, Task


def evaluate(
    model: str,
    tasks: str | None,
    data: str | None,
    check: str | None,
    out: str | None,
    own: str | None,
    images: str | None,
    metric: str,
    prompts: list[str] | None,
    batch_size: int,
    limit: int | None,
    device: str,
    dtype: str,
    **judging: Any,
) -> int:
    """Asks a model a benchmark's questions and prints its scores beside the paper's; or says what files are missing."""
    from vlmamba.evaluation.tasks import TASKS, get_task

    names = list(TASKS) if tasks is None else [get_task(name).name for name in tasks.replace(",", " ").split()]
    if check is not None:
        return _check(Path(check), names)
    chosen: list[Any] = [_own(metric, images)] if own else list(names)
    if own and data:
        raise ValueError("--own FILE names a user's own questions and --data a folder of benchmarks; give one of them")
    if own and tasks is not None:
        raise ValueError("--own FILE is a task by itself; leave out --tasks")
    if not own and not data:
        raise ValueError("--data FOLDER is needed, the folder of the benchmarks (vlmamba eval --check FOLDER looks)")
    if own:
        chosen[0].require_pictures(Path(own))

    from vlmamba.commands.load import find_model, load, name_of

    called = Path(name_of(model)).name
    place = Path(out or Path("runs") / "eval" / called)
    judging["judge_cache"] = judging["judge_cache"] or str(place / "judge.jsonl")
    options = _options(**judging)
    given = (_assignment(prompt) for prompt in prompts or [])
    variants = {task if own else get_task(task).name: variant for task, variant in given}

    from rich.console import Console

    from vlmamba.evaluation import api
    from vlmamba.evaluation.results import table

    shard = _shard()
    if shard.world_size > 1 and device == "auto" and _has_cuda():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    folder = find_model(model)
    answerer = answerer_of(load(model, device, dtype), model, folder)
    results = api.evaluate(
        answerer,
        chosen,
        Path(own or data or "."),
        place,
        variants=variants,
        limit=limit,
        batch_size=batch_size,
        shard=shard,
        options=options,
        say=_say,
    )
    if results:
        Console().print(table(results, called))
        for result in results:
            for note in result["notes"]:
                print(f"{result['title']}: {note}")
        print(f"answers and results: {place}")
    return 0


def score(
    task: str,
    predictions: str,
    data: str,
    json_file: str | None,
    submissions: str | None,
    images: str | None,
    metric: str,
    **judging: Any,
) -> None:
    """Scores anybody's answers to a benchmark as its official tool does."""
    from vlmamba.evaluation import api
    from vlmamba.evaluation.results import brief

    chosen = _own(metric, images) if task == "own" else task
    result = api.score(
        chosen,
        Path(data),
        Path(predictions),
        options=_options(**judging),
        out=None if json_file is None else Path(json_file),
        submissions=None if submissions is None else Path(submissions),
        say=_say,
    )
    error = result["standard_error"]
    about = "" if error is None else f" ± {_number(error)} (standard error)"
    print(f"{result['title']}, {result['metric']}: {_number(result['headline'])}{about}")
    for line in _flat(brief(result["metrics"])):
        print(f"  {line}")
    counts = result["coverage"]
    print(f"answered: {counts['answered']} of {counts['questions']} questions")
    if odd := ", ".join(f"{counts[k]} {k}" for k in ("missing", "duplicates", "unknown") if counts[k]):
        print(f"note: of the answers there are {odd}")
    for note in result["notes"]:
        print(f"note: {note}")


def report(run: str, output: str, compare: str | None, sample: int) -> None:
    """Writes the page of an evaluation: scores, skills, answers with their pictures, another run beside it."""
    from vlmamba.evaluation.report import report as write

    print(write(Path(run), Path(output), compare=None if compare is None else Path(compare), sample=sample))


def answerer_of(loaded: Loaded, name: str, folder: Path) -> ModelAnswerer:
    """A loaded model as the runner asks it; name and folder go into the results."""
    from vlmamba.commands.answerer import IMAGE_MODE, ModelAnswerer
    from vlmamba.evaluation.results import weights_hash

    facts = {
        "model": name,
        "weights": weights_hash(folder),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "decoding": "greedy",
        "template": "v1",
        "image_mode": IMAGE_MODE,
    }
    return ModelAnswerer(loaded.model, loaded.processor, facts)


def _check(data: Path, names: Sequence[str]) -> int:
    from vlmamba.evaluation import api

    found = api.check(data, names)
    for item in found:
        print(item)
    return int(not all(item.ready for item in found))


def _own(metric: str, images: str | None) -> Task:
    from vlmamba.evaluation.own import OwnData

    return OwnData(metric, None if images is None else Path(images))  # type: ignore[arg-type]


def _options(
    rule: str,
    judge_url: str | None,
    judge_model: str | None,
    judge_cache: str | None,
    judge_price: str | None,
    judge_runs: int,
    few_shot: str | None,
) -> Options:
    from vlmamba.evaluation.judge import Judge
    from vlmamba.evaluation.task import Options

    if rule not in ("2023-12", "current"):
        raise ValueError(f"--rule {rule} is unknown; MMBench's rules are 2023-12 and current")
    if (judge_url is None) != (judge_model is None):
        raise ValueError("a judge needs both --judge-url and --judge-model")
    if judge_runs < 1:
        raise ValueError(f"--judge-runs must be at least 1, found {judge_runs}")
    cache = None if judge_cache is None else Path(judge_cache)
    judge = None
    if judge_url is not None and judge_model is not None:
        judge = Judge(judge_url, judge_model, cache, price=None if judge_price is None else _price(judge_price))
    text = None if few_shot is None else Path(few_shot).read_text(encoding="utf-8")
    return Options(rule=rule, judge=judge, few_shot=text, runs=judge_runs)  # type: ignore[arg-type]


def _price(text: str) -> tuple[float, float]:
    try:
        into, out = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--judge-price {text!r}: expected dollars per million tokens in and out, as 2.5,10") from None
    return into, out


def _assignment(prompt: str) -> tuple[str, str]:
    task, equals, variant = prompt.partition("=")
    if not (task and equals and variant):
        raise ValueError(f"--prompts {prompt!r}: expected TASK=VARIANT, such as textvqa=ocr-before")
    return task, variant


def _shard() -> Shard:
    """This process's part under torchrun; everything otherwise."""
    from vlmamba.evaluation.runner import Shard

    return Shard(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _flat(value: Any, name: str = "") -> list[str]:
    """Nested numbers, one line each."""
    if isinstance(value, Mapping):
        return [line for key, part in value.items() for line in _flat(part, f"{name}/{key}" if name else str(key))]
    shown = _number(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return [f"{name}: {shown}"]


def _number(value: float | None) -> str:
    return "not scored" if value is None else f"{value:.2f}"
