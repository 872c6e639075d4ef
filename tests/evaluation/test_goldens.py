"""Scorers against numbers that the official tools gave for made-up answers, to the last digit: what does not show in
the metrics of `test_files_to_scores`, which holds the others to theirs."""

from __future__ import annotations

from typing import Any

import pytest
from official import golden

from vlmamba.evaluation.scoring import mmbench, mmvet, scienceqa, vqa


def test_both_vqa_normalisers_agree_on_every_string() -> None:
    _, expected = golden("vqav2")
    for row in expected["normalisation_table"]:
        assert vqa.normalize_vqa(row["raw"]) == row["vqa_official"], row
        assert vqa.normalize_m4c(row["raw"]) == row["evalai_m4c"], row


def test_scienceqa() -> None:
    inputs, expected = golden("scienceqa")
    problems = {pid: inputs["problems"][pid] for pid in inputs["pid_splits"]["test"]}
    answers = {a["question_id"]: (a["text"], "<image>" in a["prompt"]) for a in inputs["predictions"]}
    scores = scienceqa.score_scienceqa(problems, answers)
    assert {k: scores[k] for k in ("acc", "correct", "count", "img_acc", "img_count")} == {
        k: expected[k] for k in ("acc", "correct", "count", "img_acc", "img_count")
    }
    assert {pid: q["index"] for pid, q in scores["perQuestion"].items()} == expected["pred_index"]
    for pid, wanted in expected["per_question"].items():
        assert {k: scores["perQuestion"][pid][k] for k in wanted} == wanted
    printed = dict(
        line.split(": \t") for line in expected["official_evaluate_acc_stdout"].splitlines() if ": \t" in line
    )
    printed = {name: value for name, value in printed.items() if value != "-1"}
    assert {name: f"{value:.2f}" for name, value in scores["byCondition"].items()} == printed


@pytest.mark.parametrize(("name", "rule"), [("vlmevalkit_head", "current"), ("vlmevalkit_2023-12", "2023-12")])
@pytest.mark.parametrize("judge", ["exact_matching", "fake_judge"])
def test_mmbench(name: str, rule: mmbench.Rule, judge: str) -> None:
    inputs, expected = golden("mmbench")
    wanted = expected[f"{name}_{judge}"]
    calls = []

    def fake_judge(row: Any, prediction: str) -> str:  # the golden's own rule, in its words: inputs.fake_judge_rule
        calls.append(row["index"])
        found = [o for o in "ABCD" if row[o] is not None and row[o].split()[-1].lower() in prediction.lower()]
        return found[-1] if found else "Z" if rule == "current" else "E"

    rows = [{**row, "prediction": str(row["prediction"])} for row in inputs["rows"]]
    scores = mmbench.score_mmbench(rows, rule, fake_judge if judge == "fake_judge" else None)
    assert wanted["acc"].pop("split") == "dev"
    assert scores["acc"] == wanted["acc"]
    assert scores["hit"] == wanted["hit"]
    assert scores["inferred"] == wanted["prefetch_option"]
    assert len(calls) == wanted["n_judge_calls"]
    assert scores["vanilla"]["first"] == wanted["vanilla_circ0_prefetch_only"]
    assert scores["vanilla"]["all"] == wanted["vanilla_all_prefetch_only"]


def test_mmvet() -> None:
    inputs, expected = golden("mmvet")
    replies = {qid: iter(texts) for qid, texts in inputs["judge_replies_in_call_order_per_id"].items()}
    calls: list[list[Any]] = []
    grades: dict[str, list[float]] = {qid: [] for qid in inputs["metadata"]}
    for _ in range(inputs["num_run"]):
        for qid, item in inputs["metadata"].items():

            def ask(prompt: str, temperature: float, qid: str = qid) -> str:
                calls.append([qid, temperature, 3])
                return next(replies[qid])

            prompt = mmvet.judge_prompt("", item["question"], item["answer"], inputs["predictions"][qid])
            grades[qid].append(mmvet.grade(prompt, ask)[0])
    assert grades == {qid: graded["score"] for qid, graded in expected["grades"].items()}
    assert calls == expected["calls_id_temperature_maxtokens"]

    scores = mmvet.score_mmvet(inputs["metadata"], grades)
    for table, text in zip(("perCapability", "perCapabilitySet"), expected["csv"].values()):
        header, row = (line.split(",") for line in text.splitlines())
        names = header[1 : header.index("total")]
        printed = dict(zip(names, map(float, row[1:])))
        # The tool joins a set's names in the order of a hash; ours are sorted.
        ours = {"_".join(sorted(name.split("_"))): value for name, value in printed.items()}
        assert scores[table] == ours
        assert [scores["total"], scores["std"]] == [float(v) for v in row[1 + len(names) : 3 + len(names)]]
    assert scores["runs"] == [41.2, 45.7]
