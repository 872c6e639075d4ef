"""Standard errors of headlines: against formulas, and against the spread of scores of resampled pictures."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest
from official import WRITERS, put_json

from vlmamba.evaluation import OwnData, score
from vlmamba.evaluation.api import folder_of
from vlmamba.evaluation.runner import by_picture
from vlmamba.evaluation.task import Example, Joined, Options, Prediction
from vlmamba.evaluation.tasks import TASKS
from vlmamba.evaluation.uncertainty import _jackknife, standard_error


def own_error(folder: Path, right: list[bool], each: int) -> float:
    """Of a set of one picture per entry, asked `each` times, answered alike."""
    name = f"{len(right)}-{each}.json"
    records, answers = [], []
    for i, good in enumerate(right):
        for k in range(each):
            turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}]
            records.append({"id": f"{i}-{k}", "image": f"{i}.png", "conversations": turns})
            answers.append({"question_id": f"{i}-{k}", "text": "yes" if good else "no"})
    data, said = put_json(folder / name, records), put_json(folder / f"said-{name}", answers)
    return score(OwnData("exact"), data, said)["standard_error"]


def test_questions_on_one_picture_count_as_one_draw(tmp_path: Path) -> None:
    right = [i % 10 < 7 for i in range(200)]
    expected = 100 * statistics.stdev(map(float, right)) / math.sqrt(200)
    assert own_error(tmp_path, right, 1) == pytest.approx(expected)
    assert own_error(tmp_path, right, 5) == pytest.approx(expected)


def test_one_picture_says_nothing_of_the_spread(tmp_path: Path) -> None:
    assert own_error(tmp_path, [True], 3) is None


def test_the_jackknife_of_a_mean_is_the_formula() -> None:
    values = [random.Random(2).gauss(0, 1) for _ in range(40)]
    left_out = [(sum(values) - value) / 39 for value in values]
    assert _jackknife(left_out) == pytest.approx(statistics.stdev(values) / math.sqrt(40))


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_headlines_that_are_no_means(name: str, tmp_path: Path) -> None:
    """F1 and accuracy+, against the bootstrap over pictures, which takes much longer."""
    task = TASKS[name]
    folder = folder_of(task, WRITERS[name](tmp_path / name))
    draw, examples = random.Random(3), task.examples(folder, "llava")
    said = {e.id: "yes" if (e.target.lower() == "yes") == (draw.random() < 0.8) else "no" for e in examples}

    def joined(chosen: list[Example]) -> Joined:
        return Joined(chosen, [(e, Prediction(e.question_id, said[e.id])) for e in chosen], [])

    whole = task.score(joined(list(examples)), folder, Options())
    error = standard_error(task, joined(list(examples)), whole, folder, Options())
    assert error is not None
    # Resampling repeats pictures; the scorers know a question once, so a repeated picture gets another name.
    groups, heads = by_picture(examples), []
    for _ in range(120):
        chosen = []
        for copy, group in enumerate(draw.choices(groups, k=len(groups))):
            for e in group:
                named = Example(f"{copy}#{e.id}", e.question_id, e.prompt, e.image, e.target, e.skill, e.data)
                said[named.id] = said[e.id]
                chosen.append(named)
        heads.append(task.score(joined(chosen), folder, Options()).headline)
    assert error == pytest.approx(statistics.stdev(heads), rel=0.35)
