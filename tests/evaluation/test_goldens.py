"""Every scorer against numbers that the official tools gave for made-up answers, to the last digit."""

from __future__ import annotations

from typing import Any

import pytest
from official import golden

from vlmamba.evaluation.scoring import gqa, mmbench, mme, mmvet, pope, scienceqa, vqa


def test_both_vqa_normalisers_agree_on_every_string() -> None:
    _, expected = golden("vqav2")
    for row in expected["normalisation_table"]:
        assert vqa.normalize_vqa(row["raw"]) == row["vqa_official"], row
        assert vqa.normalize_m4c(row["raw"]) == row["evalai_m4c"], row


@pytest.mark.parametrize("path", ["official_on_raw_results", "official_on_llava_submission"])
def test_vqav2(path: str) -> None:
    inputs, expected = golden("vqav2")
    answers = {r["question_id"]: r["answer"] for r in inputs["results"]}
    if path == "official_on_llava_submission":
        answers = {qid: vqa.normalize_m4c(text) for qid, text in answers.items()}
        assert answers == {r["question_id"]: r["answer"] for r in expected["llava_submission"]}
    scores = vqa.score_vqav2(inputs["annotations"]["annotations"], answers)
    assert scores.pop("perQuestion") == expected[path]["perQuestion"]
    assert scores == expected[path]["accuracy"]


@pytest.mark.parametrize("style", ["testdev_style_no_choices", "val_style_choices_consistency"])
def test_gqa(style: str) -> None:
    inputs, expected = golden("gqa")
    answers = {a["question_id"]: gqa.prediction(a["text"]) for a in inputs["answers"]}
    assert answers == {p["questionId"]: p["prediction"] for p in expected[style]["predictions_file"]}
    full = style.startswith("val")
    scores = gqa.score_gqa(inputs["questions"], answers, inputs["choices"] if full else None, consistency=full)
    wanted = expected[style]["scores"]
    assert wanted.pop("grounding") == 0  # needs attention maps, which nobody submits
    assert scores == wanted


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


def test_pope() -> None:
    inputs, expected = golden("pope")
    category = {q["question_id"]: q["category"] for q in inputs["questions"]}
    splits = {}
    for name in ("adversarial", "random", "popular"):
        texts = [a["text"] for a in inputs["answers"] if category[a["question_id"]] == name]
        splits[name] = zip(texts, [line["label"] for line in inputs["annotation_files"][f"coco_pope_{name}.json"]])
    assert pope.score_pope(splits) == expected["per_category"]


def test_mme() -> None:
    _, expected = golden("mme")
    tasks = {}
    for name, text in expected["converted_txt"].items():
        lines = [line.split("\t") for line in text.rstrip("\n").split("\n")]
        tasks[name] = [[(line[3], line[2]) for line in lines[i : i + 2]] for i in range(0, len(lines), 2)]
    scores = mme.score_mme(tasks)
    assert scores["scores"] == expected["scores"]
    assert scores["detail"] == expected["detail"]


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
