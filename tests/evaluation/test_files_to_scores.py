"""Official folders and answer files to the goldens' numbers, by the function that `vlmamba score` calls."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from official import WRITERS, golden, llava_answers, put_json, put_lines

from vlmamba.commands.evaluate import score as print_score
from vlmamba.evaluation.api import check, score
from vlmamba.evaluation.task import Options
from vlmamba.evaluation.tasks import TASKS


def scored(name: str, tmp_path: Path, answers: Any = None, **options: Any) -> dict[str, Any]:
    data = WRITERS[name](tmp_path / "data" / name)
    file = answers or put_lines(tmp_path / "answers.jsonl", llava_answers(name))
    return score(name, data.parent, file, options=Options(**options))


def test_vqav2_from_llava_and_from_the_challenge_format(tmp_path: Path) -> None:
    inputs, expected = golden("vqav2")
    raw = put_json(tmp_path / "results.json", inputs["results"])
    for answers, path in ((None, "official_on_llava_submission"), (raw, "official_on_raw_results")):
        result, wanted = scored("vqav2", tmp_path, answers), expected[path]
        assert {name: result["metrics"][name] for name in wanted["accuracy"]} == wanted["accuracy"]
        assert result["metrics"][path]["perQuestion"] == wanted["perQuestion"]
        assert result["headline"] == wanted["accuracy"]["overall"]


def test_vqav2_submission_covers_all_test_ids(tmp_path: Path) -> None:
    inputs, expected = golden("vqav2")
    data = tmp_path / "data"
    put_json(data / "v2_OpenEnded_mscoco_test-dev2015_questions.json", inputs["questions"])
    everything = [*inputs["questions"]["questions"], {"question_id": 77, "image_id": 1, "question": "not asked?"}]
    put_json(data / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": everything})
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers("vqav2"))
    result = score("vqav2", data, answers, submissions=tmp_path / "out")
    assert result["headline"] is None
    assert "server" in result["notes"][0]
    written = json.loads((tmp_path / "out" / "vqav2_submission.json").read_text())
    by_id = {row["question_id"]: row["answer"] for row in written}
    assert by_id == {r["question_id"]: r["answer"] for r in expected["llava_submission"]} | {77: ""}


def test_textvqa_joins_on_picture_and_question(tmp_path: Path) -> None:
    _, expected = golden("textvqa")
    result = scored("textvqa", tmp_path)
    assert result["metrics"]["accuracy"] == expected["accuracy"]
    assert f"Accuracy: {result['headline']:.2f}%" in expected["stdout"]


def test_textvqa_counts_lines(tmp_path: Path) -> None:
    lines = llava_answers("textvqa")
    per_line = golden("textvqa")[1]["perResultLine"]
    # A doubled line counts twice, a missing one not at all: the official denominator is the number of lines.
    file = put_lines(tmp_path / "answers.jsonl", [*lines[:10], lines[0]])
    result = scored("textvqa", tmp_path, file)
    assert result["metrics"]["samples"] == 11
    assert result["metrics"]["accuracy"] == pytest.approx((sum(per_line[:10]) + per_line[0]) / 11)
    assert result["coverage"] == {"questions": 400, "answered": 10, "missing": 390, "duplicates": 1, "unknown": 0}


def test_textvqa_the_last_of_two_same_questions_answers_for_both(tmp_path: Path) -> None:
    about = {"image_id": "a", "question": "What is it?"}
    items = [{**about, "question_id": i, "answers": [truth] * 10} for i, truth in enumerate(("cat", "dog"))]
    put_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": items})
    own = [{"task": "textvqa", "id": str(i), "question_id": "a", "text": text} for i, text in enumerate(("cat", "dog"))]
    result = score("textvqa", tmp_path, put_lines(tmp_path / "a.jsonl", own))
    assert (result["headline"], result["coverage"]["answered"]) == (50.0, 2)  # as LLaVA's script scores that file


@pytest.mark.parametrize("choices", [False, True])
def test_gqa(tmp_path: Path, choices: bool) -> None:
    inputs, expected = golden("gqa")
    wanted = expected["val_style_choices_consistency" if choices else "testdev_style_no_choices"]
    assert wanted["scores"].pop("grounding") == 0  # needs attention maps, which nobody submits
    data = WRITERS["gqa"](tmp_path / "data")
    if choices:
        put_json(data / "testdev_choices.json", inputs["choices"])
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers("gqa"))
    result = score("gqa", data, answers, submissions=tmp_path / "out")
    assert result["metrics"] == wanted["scores"]
    # What we would submit is what LLaVA's conversion gives, and scores the same when read back.
    written = json.loads((tmp_path / "out" / "gqa_predictions.json").read_text())
    assert {row["questionId"]: row["prediction"] for row in written} == {
        row["questionId"]: row["prediction"] for row in wanted["predictions_file"]
    }
    again = score("gqa", data, tmp_path / "out" / "gqa_predictions.json")
    assert again["metrics"] == wanted["scores"]


def test_scienceqa(tmp_path: Path) -> None:
    _, expected = golden("scienceqa")
    result = scored("scienceqa", tmp_path)
    for name in ("acc", "correct", "count", "img_acc", "img_count"):
        assert result["metrics"][name] == expected[name]
    # The authors' own result file holds option numbers.
    for numbers in (expected["pred_index"], {pid: str(index) for pid, index in expected["pred_index"].items()}):
        result = scored("scienceqa", tmp_path, put_json(tmp_path / "r.json", {"results": numbers}))
        assert result["metrics"]["correct"] == expected["correct"]


def test_pope(tmp_path: Path) -> None:
    inputs, expected = golden("pope")
    assert scored("pope", tmp_path)["metrics"] == expected["per_category"]
    # The authors' format: a file per split, answers in the order of the questions.
    number = {q["question_id"]: q["category"] for q in inputs["questions"]}
    for split in ("random", "popular", "adversarial"):
        lines = [
            {"question": a["prompt"], "answer": a["text"]}
            for a in inputs["answers"]
            if number[a["question_id"]] == split
        ]
        put_lines(tmp_path / "pope_out" / f"coco_pope_{split}_answers.json", lines)
    assert scored("pope", tmp_path, tmp_path / "pope_out")["metrics"] == expected["per_category"]


def test_pope_answers_in_any_order_meet_their_own_labels(tmp_path: Path) -> None:
    _, expected = golden("pope")
    lines = llava_answers("pope")[::-1]
    result = scored("pope", tmp_path, put_lines(tmp_path / "answers.jsonl", lines))
    assert result["metrics"] == expected["per_category"]


def test_mme(tmp_path: Path) -> None:
    _, expected = golden("mme")
    result = scored("mme", tmp_path)
    assert result["metrics"]["scores"] == expected["scores"]
    assert result["metrics"]["detail"] == expected["detail"]
    for name, text in expected["converted_txt"].items():
        path = tmp_path / "official" / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert scored("mme", tmp_path, tmp_path / "official")["metrics"] == result["metrics"]
    # What we write for the official tool reads back as the same scores.
    data = tmp_path / "data"
    score("mme", data, tmp_path / "answers.jsonl", submissions=tmp_path / "out")
    again = score("mme", data, tmp_path / "out" / "mme_results")["metrics"]
    assert again["scores"]["Perception"]["tasks"].keys() == expected["scores"]["Perception"]["tasks"].keys()


@pytest.mark.parametrize(("rule", "key"), [("2023-12", "vlmevalkit_2023-12"), ("current", "vlmevalkit_head")])
def test_mmbench(tmp_path: Path, rule: str, key: str) -> None:
    wanted = golden("mmbench")[1][f"{key}_exact_matching"]
    result = scored("mmbench", tmp_path, rule=rule)
    del wanted["acc"]["split"]
    assert result["metrics"]["acc"] == wanted["acc"]
    assert result["metrics"]["hit"] == wanted["hit"]
    assert "undecided, counted wrong" in result["notes"][1]


def test_mmbench_table_written_and_read(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    data = WRITERS["mmbench"](tmp_path / "data")
    rows = [row for row in llava_answers("mmbench") if row["text"] is not None]
    answers = put_lines(tmp_path / "answers.jsonl", rows)
    first = score("mmbench", data, answers, submissions=tmp_path / "out")
    again = score("mmbench", data, tmp_path / "out" / "mmbench_submission.xlsx")
    assert again["metrics"] == first["metrics"]
    sheet = openpyxl.load_workbook(tmp_path / "out" / "mmbench_submission.xlsx").active
    header = [cell.value for cell in sheet[1]]
    assert header == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert sheet.max_row == 1 + 388
    with (
        zipfile.ZipFile(tmp_path / "out" / "mmbench_submission.xlsx") as whole,
        zipfile.ZipFile(tmp_path / "half.xlsx", "w") as half,
    ):
        for file in whole.namelist():
            content = whole.read(file)
            half.writestr(file, content[: len(content) // 2] if "sheet1" in file else content)
    with pytest.raises(ValueError, match=r"half.xlsx is damaged"):
        score("mmbench", data, tmp_path / "half.xlsx")


def test_mmvet_without_a_judge_is_not_judged(tmp_path: Path) -> None:
    inputs, _ = golden("mmvet")
    data = WRITERS["mmvet"](tmp_path / "data")
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers("mmvet"))
    result = score("mmvet", data, answers, submissions=tmp_path / "out")
    assert result["headline"] is None
    assert "not judged" in result["notes"][0]
    assert json.loads((tmp_path / "out" / "mmvet_result.json").read_text()) == inputs["predictions"]
    # ... and the file we wrote is one we read.
    assert score("mmvet", data, tmp_path / "out" / "mmvet_result.json")["coverage"]["answered"] == 200


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize("other", sorted(WRITERS))
def test_another_benchmarks_answers_are_refused(name: str, other: str, tmp_path: Path) -> None:
    if name == other:
        return
    data = WRITERS[name](tmp_path / "data")
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers(other))
    with pytest.raises(ValueError, match="another benchmark"):
        score(name, data, answers, out=tmp_path / "result.json")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_wrong_folder_says_what_is_missing_and_where_it_is(name: str, tmp_path: Path) -> None:
    other = WRITERS["gqa" if name == "pope" else "pope"](tmp_path / "data")
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers(name))
    with pytest.raises(ValueError, match=r"is missing.*(https://)"):
        score(name, other, answers, out=tmp_path / "result.json")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("name", sorted(set(WRITERS) - {"mme", "mmbench"}))
def test_a_damaged_annotation_file_is_named(name: str, tmp_path: Path) -> None:
    data = WRITERS[name](tmp_path / "data")
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers(name))
    victim = sorted(data.rglob("*.json"))[0]
    victim.write_text(victim.read_text()[: len(victim.read_text()) // 2])
    with pytest.raises(ValueError, match=f"{victim.name}.*damaged"):
        score(name, data, answers, out=tmp_path / "result.json")
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_damaged_file_of_answers_is_named(name: str, tmp_path: Path) -> None:
    data = WRITERS[name](tmp_path / "data")
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers(name)[:5])
    answers.write_text(answers.read_text()[:-20])
    with pytest.raises(ValueError, match=r"answers.jsonl, line 5 is damaged"):
        score(name, data, answers, out=tmp_path / "result.json", submissions=tmp_path / "submissions")
    for text in ("[" * 100_000, '{"1": ' + "9" * 5000 + "}"):  # too deep for Python's reader, too long for it
        answers.write_text(text)
        with pytest.raises(ValueError, match=r"answers.jsonl, line 1 is damaged"):
            score(name, data, answers, out=tmp_path / "result.json", submissions=tmp_path / "submissions")
    assert not (tmp_path / "result.json").exists()
    assert not (tmp_path / "submissions").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vqav2", {"answers": [1]}),
        ("vqav2", {"answers": ["x"]}),
        ("scienceqa", {"results": {"16": None}}),
        ("scienceqa", {"results": {"16": "A"}}),
    ],
)
def test_answers_of_another_kind_are_named(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"r\.json.* expected "):
        scored(name, tmp_path, put_json(tmp_path / "r.json", value))


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    data = WRITERS["mmbench"](tmp_path / "mmbench")
    table = data / "mmbench_dev_20230712.tsv"
    table.write_text(table.read_text().replace("answer", "antwort", 1))
    with pytest.raises(ValueError, match="answer are missing"):
        score("mmbench", data, put_lines(tmp_path / "a.jsonl", llava_answers("mmbench")))
    table.write_text(table.read_text().replace("antwort", "answer", 1).replace("\n1000133\t", "\ninf\t", 1))
    with pytest.raises(ValueError, match="index must be a number, found 'inf'"):
        score("mmbench", data, put_lines(tmp_path / "a.jsonl", llava_answers("mmbench")))
    data = WRITERS["mme"](tmp_path / "mme")
    victim = next(data.rglob("0001.txt"))
    victim.write_text("Is it red? Yes\n")
    with pytest.raises(ValueError, match=r"0001.txt, line 1: expected a question, a tab and Yes or No"):
        score("mme", data, put_lines(tmp_path / "a.jsonl", llava_answers("mme")))


def test_textvqa_passes_over_an_unknown_question(tmp_path: Path) -> None:
    lines = llava_answers("textvqa")
    unknown = {**lines[0], "prompt": "what is not asked?"}
    result = scored("textvqa", tmp_path, put_lines(tmp_path / "answers.jsonl", [unknown, *lines]))
    assert result["metrics"] == scored("textvqa", tmp_path)["metrics"]
    assert result["coverage"]["unknown"] == 1


def wrong(line: dict[str, Any]) -> dict[str, Any]:
    return {**line, "text": "neither here nor there"}


@pytest.mark.parametrize("name", ["vqav2", "gqa", "scienceqa", "pope", "mme", "mmbench", "mmvet"])
def test_duplicates_and_unknown_ids_change_nothing(name: str, tmp_path: Path) -> None:
    lines = llava_answers(name)
    clean = scored(name, tmp_path)
    # Of two answers to a question the later one counts, as in the tables that the official tools build from lines;
    # an answer to a question that the data set does not have is passed over.
    unknown = {**lines[0], "question_id": "999999999"}
    file = put_lines(tmp_path / "more.jsonl", [wrong(lines[0]), unknown, *lines])
    more = scored(name, tmp_path, file)
    assert more["metrics"] == clean["metrics"]
    assert more["coverage"] == clean["coverage"] | {"duplicates": 1, "unknown": 1}


@pytest.mark.parametrize("name", ["vqav2", "gqa", "mme", "mmbench"])
def test_a_missing_answer_is_a_wrong_one(name: str, tmp_path: Path) -> None:
    lines = llava_answers(name)
    if name == "mmbench":  # its first copy, so that "wrong" and "undecided" are the same loss
        lines = sorted(lines, key=lambda line: line["question_id"])
    fewer = scored(name, tmp_path, put_lines(tmp_path / "fewer.jsonl", lines[1:]))
    # VQAv2: LLaVA submits "" for it, which is right where an annotator's "A a the" came to nothing as well.
    instead = {**lines[0], "text": ""} if name == "vqav2" else wrong(lines[0])
    worse = scored(name, tmp_path, put_lines(tmp_path / "worse.jsonl", [instead, *lines[1:]]))
    assert fewer["coverage"]["missing"] == 1
    assert fewer["headline"] == worse["headline"]


def test_missing_answers_elsewhere(tmp_path: Path) -> None:
    # ScienceQA: wrong, but not among those with a picture, for LLaVA asks the prompt and there is none.
    lines = llava_answers("scienceqa")
    clean = scored("scienceqa", tmp_path)["metrics"]
    with_picture = next(line for line in lines if "<image>" in line["prompt"])
    lines.remove(with_picture)
    fewer = scored("scienceqa", tmp_path, put_lines(tmp_path / "fewer.jsonl", lines))["metrics"]
    assert (fewer["count"], fewer["img_count"]) == (clean["count"], clean["img_count"] - 1)
    # POPE: not counted.
    fewer = scored("pope", tmp_path, put_lines(tmp_path / "fewer.jsonl", llava_answers("pope")[1:]))["metrics"]
    assert fewer["adversarial"]["n"] == 149
    # ... and a split without any answer is left out of the means.
    only = [line for line in llava_answers("pope") if line["question_id"] < 10_000_000]
    result = scored("pope", tmp_path, put_lines(tmp_path / "only.jsonl", only))
    assert result["headline"] == 100 * result["metrics"]["adversarial"]["f1"]
    assert "no answer to random, popular" in result["notes"][1]
    # A result that says so is not read back as if something had been said.
    data = WRITERS["pope"](tmp_path / "data" / "pope")
    score("pope", data, tmp_path / "fewer.jsonl", out=tmp_path / "result.json")
    assert score("pope", data, tmp_path / "result.json")["metrics"] == fewer


def test_mmbench_rows_and_rotations(tmp_path: Path) -> None:
    inputs, _ = golden("mmbench")
    clean = scored("mmbench", tmp_path)["metrics"]
    # Rows as the official table has them: the truth beside the prediction is not what was said.
    assert scored("mmbench", tmp_path, put_json(tmp_path / "rows.json", inputs["rows"]))["metrics"] == clean
    # LLaVA's own rotations (round_id 1 and on) are never submitted.
    rounds = [wrong(line) | {"round_id": 1} for line in llava_answers("mmbench")]
    file = put_lines(tmp_path / "rounds.jsonl", [*llava_answers("mmbench"), *rounds])
    assert scored("mmbench", tmp_path, file)["metrics"] == clean


def test_vqav2_folder_with_both_sets(tmp_path: Path) -> None:
    data = WRITERS["vqav2"](tmp_path / "data")
    test = [{"question_id": 5, "image_id": 6, "question": "what?"}]
    put_json(data / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": test})
    assert len(TASKS["vqav2"].examples(data, "llava")) == 400
    (example,) = TASKS["vqav2"].examples(data, "llava-test-dev")
    assert str(example.image).endswith("COCO_test2015_000000000006.jpg")


@pytest.mark.parametrize(
    ("name", "file", "place"),
    [
        ("vqav2", "v2_mscoco_val2014_annotations.json", ("annotations", 3, "answers", 0)),
        ("vqav2", "v2_mscoco_val2014_annotations.json", ("annotations", 3, "question_type")),
        ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", ("questions", 3, "image_id")),
        ("vqav2", "v2_mscoco_val2014_annotations.json", ("annotations", 3, "answers")),
        ("gqa", "testdev_balanced_questions.json", ("20000003", "question")),
        ("gqa", "testdev_balanced_questions.json", ("20000003", "answer")),
        ("gqa", "testdev_balanced_questions.json", ("20000003", "types", "structural")),
        ("gqa", "testdev_balanced_questions.json", ("20000003", "groups")),
        ("gqa", "testdev_balanced_questions.json", ("20000003", "semantic", 0)),
        ("scienceqa", "problems.json", ("6", "choices")),
        ("scienceqa", "problems.json", ("6", "grade")),
        ("scienceqa", "problems.json", ("6", "topic")),
        ("scienceqa", "pid_splits.json", ("test",)),
        ("textvqa", "TextVQA_0.5.1_val.json", ("data", 3, "question")),
        ("mmvet", "mm-vet.json", ("v1_3", "imagename")),
        ("mmvet", "mm-vet.json", ("v1_3", "answer")),
        ("mmvet", "mm-vet.json", ("v1_3", "capability")),
    ],
)
@pytest.mark.parametrize("value", [{}, None])
def test_an_annotation_of_another_kind_is_the_file_s_fault(
    name: str, file: str, place: tuple[Any, ...], value: Any, tmp_path: Path
) -> None:
    data = WRITERS[name](tmp_path / "data")
    content = part = json.loads((data / file).read_text())
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    put_json(data / file, content)
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers(name))
    with pytest.raises(ValueError, match=str(data)):
        score(name, data, answers, out=tmp_path / "result.json", submissions=tmp_path / "submissions")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "data"]
    assert not next(iter(check(data, [name]))).ready


@pytest.mark.parametrize(("field", "value"), [("prompt", 5), ("question_id", [1]), ("text", ["yes"])])
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_prediction_of_another_kind_is_named(name: str, field: str, value: Any, tmp_path: Path) -> None:
    lines = llava_answers(name)
    lines[2] = {**lines[2], field: value}
    with pytest.raises(ValueError, match=r"answers.jsonl, entry 3: .* must be a text"):
        scored(name, tmp_path, put_lines(tmp_path / "answers.jsonl", lines))


def test_a_text_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    data = WRITERS["mme"](tmp_path / "data")
    next(data.rglob("0001.txt")).write_bytes(b"Is it caf\xe9?\tYes\n")
    with pytest.raises(ValueError, match=r"0001\.txt cannot be read"):
        score("mme", data, put_lines(tmp_path / "a.jsonl", llava_answers("mme")))


def test_mme_file_keeps_every_blank(tmp_path: Path) -> None:
    lines = llava_answers("mme")
    lines[0] = {**lines[0], "text": "\n\n\n\nyes"}  # beyond the fourth character: neither yes nor no
    first = scored("mme", tmp_path, put_lines(tmp_path / "a.jsonl", lines))
    score("mme", tmp_path / "data", tmp_path / "a.jsonl", submissions=tmp_path / "out")
    assert scored("mme", tmp_path, tmp_path / "out" / "mme_results")["metrics"] == first["metrics"]


def test_half_a_character_is_written_and_read_back(tmp_path: Path) -> None:
    data = WRITERS["gqa"](tmp_path / "data")
    questions = golden("gqa")[0]["questions"]
    next(iter(questions.values()))["answer"] = "\ud83d"  # half a surrogate pair: JSON can hold it, UTF-8 cannot
    put_json(data / "testdev_balanced_questions.json", questions)
    lines = llava_answers("gqa")
    lines[0] = {**lines[0], "text": "\ud83d", "task": "gqa", "id": ["1"]}
    file = put_lines(tmp_path / "answers.jsonl", lines)
    first = score("gqa", data, file, out=tmp_path / "result.json", submissions=tmp_path / "out")
    assert score("gqa", data, tmp_path / "result.json")["metrics"] == first["metrics"]
    assert score("gqa", data, tmp_path / "out" / "gqa_predictions.json")["metrics"] == first["metrics"]


def test_vqav2_validation_beside_the_test_set_submits_its_own_answers(tmp_path: Path) -> None:
    data = WRITERS["vqav2"](tmp_path / "data")
    test = {"questions": [{"question_id": 5, "image_id": 6, "question": "what?"}]}
    put_json(data / "v2_OpenEnded_mscoco_test2015_questions.json", test)
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers("vqav2"))
    first = score("vqav2", data, answers, submissions=tmp_path / "out")
    again = score("vqav2", data, tmp_path / "out" / "vqav2_submission.json")
    assert again["headline"] == first["headline"]
    assert again["coverage"]["questions"] == again["coverage"]["answered"]


def test_vqav2_splits_are_told_by_the_names_of_the_questions(tmp_path: Path) -> None:
    data = WRITERS["vqav2"](tmp_path / "data")
    train = "v2_OpenEnded_mscoco_train2014_questions.json"
    put_json(data / train, {"questions": [{"question_id": 5, "image_id": 6, "question": "what?"}]})
    truth = json.loads((data / "v2_mscoco_val2014_annotations.json").read_text())["annotations"][0]
    put_json(data / "v2_mscoco_train2014_annotations.json", {"annotations": [{**truth, "question_id": 5}]})
    assert len(TASKS["vqav2"].examples(data, "llava")) == 400
    (data / "v2_mscoco_val2014_annotations.json").unlink()
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers("vqav2"))
    with pytest.raises(ValueError, match=r"v2_mscoco_val2014_annotations\.json, for .* is missing"):
        score("vqav2", data, answers)
    (data / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    (example,) = TASKS["vqav2"].examples(data, "llava")
    assert str(example.image).endswith("COCO_train2014_000000000006.jpg")


def test_gqa_takes_the_choices_of_its_own_tier(tmp_path: Path) -> None:
    data = WRITERS["gqa"](tmp_path / "data")
    put_json(data / "val_choices.json", {"1": {"valid": [], "plausible": []}})
    answers = put_lines(tmp_path / "answers.jsonl", llava_answers("gqa"))
    assert "no choices file" in score("gqa", data, answers)["notes"][0]
    inputs, _ = golden("gqa")
    choices = inputs["choices"]
    for entry in (None, {"valid": []}, {"valid": [], "plausible": None}):
        put_json(data / "testdev_choices.json", {**choices, "20000003": entry})
        with pytest.raises(ValueError, match=r"testdev_choices.json, 20000003: .*plausible"):
            score("gqa", data, answers)
    inputs["questions"]["20000003"]["groups"]["global"] = []
    put_json(data / "testdev_balanced_questions.json", inputs["questions"])
    with pytest.raises(ValueError, match=r"question 20000003: the global group .* must be texts"):
        score("gqa", data, answers)


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = WRITERS["scienceqa"](tmp_path / "data")
    lines = llava_answers("scienceqa")
    answers = put_lines(tmp_path / "answers.jsonl", [*lines[1:], lines[1], {**lines[1], "question_id": "unheard of"}])
    judging = dict.fromkeys(("judge_url", "judge_model", "judge_cache", "judge_price", "few_shot"))
    print_score("scienceqa", str(answers), str(data), None, None, None, "", rule="current", judge_runs=1, **judging)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) < 60  # numbers, not what stands per question
    assert "answered: 367 of 378 questions" in printed
    assert "note: of the answers there are 11 missing, 1 duplicates, 1 unknown" in printed


@pytest.mark.parametrize("missing", [False, True])
def test_mmbench_takes_nothing_said_for_the_word_nan(missing: bool, tmp_path: Path) -> None:
    """An empty cell of the table that LLaVA submits is not-a-number, whose name holds the option's "n"."""
    cells = [
        ["index", "question", "A", "B", "answer", "image", "category"],
        ["1", "Which letter?", "s", "n", "B", "", "c"],
    ]
    cells += [["2", "Which letter?", "s", "n", "A", "", "c"]]
    (tmp_path / "mmbench.tsv").write_text("".join("\t".join(row) + "\n" for row in cells), encoding="utf-8")
    lines = [{"question_id": 2, "text": "A"}, {"question_id": 1, "text": ""}]
    result = score("mmbench", tmp_path, put_lines(tmp_path / "a.jsonl", lines[: 1 if missing else 2]))
    assert result["metrics"]["inferred"] == {"1": "B", "2": "A"}


def test_mmbench_reads_its_table_as_pandas_and_llava_do(tmp_path: Path) -> None:
    table = WRITERS["mmbench"](tmp_path / "data") / "mmbench_dev_20230712.tsv"
    header, row, *lines = table.read_text(encoding="utf-8").split("\n")
    cells = row.split("\t")
    cells[2] = "none"  # no hint
    table.write_text("\ufeff" + "\n".join([header, "\t".join(cells), *lines]), encoding="utf-8")
    example = TASKS["mmbench"].examples(table.parent, "llava")[0]
    assert example.prompt.startswith(example.data["question"])
