"""The runner: no answer lost or doubled by a kill, by several processes, or by another run's folder."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from official import WRITERS, golden, put_json, put_mme
from PIL import Image
from rich.console import Console

from vlmamba.evaluation import Options, OwnData, Request, Shard, check, evaluate, report, score, table
from vlmamba.evaluation.results import load, weights_hash
from vlmamba.evaluation.runner import batches_of, read_answers
from vlmamba.evaluation.task import Example
from vlmamba.evaluation.tasks import TASKS, get_task


class Parrot:
    """Answers "yes", and remembers what it was asked. Dies after `lives` batches."""

    def __init__(self, lives: int | None = None, weights: str = "abc") -> None:
        self.asked: list[str] = []
        self.batches: list[Sequence[Request]] = []
        self.lives, self.weights = lives, weights

    def describe(self) -> dict[str, Any]:
        return {"model": "parrot", "weights": self.weights, "decoding": "greedy"}

    def answer(self, requests: Sequence[Request]) -> list[str]:
        if self.lives is not None and len(self.batches) >= self.lives:
            raise KeyboardInterrupt
        self.batches.append(requests)
        self.asked += [request.id for request in requests]
        return [" yes\n" for _ in requests]


def test_a_killed_run_goes_on_without_loss_or_repeat(tmp_path: Path) -> None:
    data = put_mme(tmp_path / "data")
    first = Parrot(lives=3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(first, ["mme"], data, tmp_path / "out", batch_size=10)
    log = tmp_path / "out" / "mme" / "answers-0-of-1.jsonl"
    assert log.read_text().count("\n") == 30
    assert not (tmp_path / "out" / "mme" / "result.json").exists()
    with log.open("a") as file:  # the kill came in mid-write
        file.write('{"task": "mme", "id": "torn')
    second = Parrot()
    (result,) = evaluate(second, ["mme"], data, tmp_path / "out", batch_size=100)
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) + len(second.asked) == 372 == result["coverage"]["answered"]
    assert [json.loads(line)["text"] for line in log.read_text().splitlines()] == ["yes"] * 372
    # Finished: nothing is asked again, and the numbers stand.
    third = Parrot()
    assert evaluate(third, ["mme"], data, tmp_path / "out")[0]["metrics"] == result["metrics"]
    assert third.asked == []


def test_questions_on_one_picture_are_asked_together(tmp_path: Path) -> None:
    data = WRITERS["pope"](tmp_path / "data")
    parrot = Parrot()
    evaluate(parrot, ["pope"], data, tmp_path / "out", batch_size=1000)
    images = [request.image for request in parrot.batches[0]]
    changes = sum(a != b for a, b in pairwise(images))
    assert changes == len(set(images)) - 1
    assert parrot.batches[0][0].text.endswith("\nAnswer the question using a single word or phrase.")
    assert parrot.batches[0][0].max_new_tokens == 128


def test_a_picture_s_questions_stay_together_and_the_next_ones_are_announced(tmp_path: Path) -> None:
    data = put_mme(tmp_path / "data")  # two questions on each picture
    parrot = Parrot()
    announced: list[list[str]] = []
    parrot.read_ahead = lambda requests: announced.append([r.id for r in requests])  # type: ignore[attr-defined]
    evaluate(parrot, ["mme"], data, tmp_path / "out", batch_size=7)
    assert [len(batch) for batch in parrot.batches] == [6] * 62
    assert all(len({request.image for request in batch}) == 3 for batch in parrot.batches)
    asked = [[request.id for request in batch] for batch in parrot.batches]
    assert announced == [a + b for a, b in pairwise([*asked, []])]
    lengths = [max(len(request.text) for request in batch) for batch in parrot.batches]
    assert lengths == sorted(lengths, reverse=True)


def test_a_picture_with_more_questions_than_a_batch_holds_is_asked_in_several() -> None:
    sizes = [2, 5, 1, 3, 3]
    groups = [[Example(f"{i}{k}", 0, "?", None, "", "", {}) for k in range(size)] for i, size in enumerate(sizes)]
    batches = list(batches_of(groups, 3))
    assert [len(batch) for batch in batches] == [2, 3, 3, 3, 3]
    assert [x for batch in batches for x in batch] == [x for group in groups for x in group]


def test_processes_share_the_questions_and_the_first_gathers(tmp_path: Path) -> None:
    data = put_mme(tmp_path / "data")
    parrots = [Parrot() for _ in range(3)]
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        shard = Shard(rank, 3, patience=20, poll=0.01)
        results[rank] = evaluate(parrots[rank], ["mme"], data, tmp_path / "out", batch_size=7, shard=shard)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = [qid for parrot in parrots for qid in parrot.asked]
    assert len(asked) == len(set(asked)) == 372
    assert min(len(parrot.asked) for parrot in parrots) > 90
    assert results[1] == results[2] == []
    (alone,) = evaluate(Parrot(), ["mme"], data, tmp_path / "alone")
    assert results[0][0]["metrics"] == alone["metrics"]
    assert [a["id"] for a in results[0][0]["answers"]] == [a["id"] for a in alone["answers"]]


def test_a_process_that_never_answers_is_named(tmp_path: Path) -> None:
    data = put_mme(tmp_path / "data")
    with pytest.raises(ValueError, match=r"answers are missing.*start the same command again"):
        evaluate(Parrot(), ["mme"], data, tmp_path / "out", shard=Shard(0, 2, patience=0.05, poll=0.01))


def test_another_model_may_not_go_on_in_the_same_folder(tmp_path: Path) -> None:
    data = put_mme(tmp_path / "data")
    evaluate(Parrot(), ["mme"], data, tmp_path / "out", limit=4)
    with pytest.raises(ValueError, match="a different prompts, questions, weights"):
        evaluate(Parrot(weights="def"), ["mme"], data, tmp_path / "out")


def test_wrong_arguments(tmp_path: Path) -> None:
    data = put_mme(tmp_path / "data")
    with pytest.raises(ValueError, match="no task 'mmee'"):
        evaluate(Parrot(), ["mmee"], data, tmp_path / "out")
    with pytest.raises(ValueError, match="no prompt variant 'ocr'"):
        evaluate(Parrot(), ["mme"], data, tmp_path / "out", variants={"mme": "ocr"})
    with pytest.raises(ValueError, match="not evaluated: pope"):
        evaluate(Parrot(), ["mme"], data, tmp_path / "out", variants={"pope": "llava"})
    with pytest.raises(ValueError, match="limit"):
        evaluate(Parrot(), ["mme"], data, tmp_path / "out", limit=0)
    with pytest.raises(ValueError, match="rank"):
        Shard(2, 2)
    silent = Parrot()
    silent.answer = lambda requests: []  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="0 answers to 64 questions"):
        evaluate(silent, ["mme"], data, tmp_path / "out")
    log = next((tmp_path / "out" / "mme").glob("run.json")).with_name("answers-0-of-1.jsonl")
    log.write_text("not json\n")
    with pytest.raises(ValueError, match="line 1 is damaged"):
        read_answers(log.parent)


@pytest.mark.parametrize(
    ("name", "asked"),
    [("mm-vet", "mmvet"), ("MM_Vet", "mmvet"), ("scienceqa-img", "scienceqa"), ("vqa-v2", "vqav2"), ("VQAv2", "vqav2")],
)
def test_a_task_has_its_name_however_it_is_written(name: str, asked: str) -> None:
    assert get_task(name) is TASKS[asked]


def test_nothing_is_asked_or_written_where_one_of_the_files_is_damaged(tmp_path: Path) -> None:
    data, parrot = tmp_path / "data", Parrot()
    put_mme(data / "mme")
    victim = next(WRITERS["pope"](data / "pope").rglob("coco_pope_random.json"))
    victim.write_text(victim.read_text()[:-9])
    with pytest.raises(ValueError, match=r"coco_pope_random.json, line \d+ is damaged"):
        evaluate(parrot, ["mme", "pope"], data, tmp_path / "out")
    assert not parrot.asked
    assert not (tmp_path / "out").exists()


def test_the_result_names_everything_and_reads_back(tmp_path: Path) -> None:
    data = WRITERS["scienceqa"](tmp_path / "data")
    (result,) = evaluate(Parrot(), ["scienceqa"], data, tmp_path / "out")
    assert result == load(tmp_path / "out" / "scienceqa")
    run = result["run"]
    assert (run["model"], run["weights"], run["decoding"], run["variant"]) == ("parrot", "abc", "greedy", "llava")
    assert run["task_version"] == TASKS["scienceqa"].version
    assert run["max_new_tokens"] == 1024
    asked = {a["id"]: a for a in result["answers"]}
    problem = golden("scienceqa")[0]["problems"]["16"]
    assert asked["16"]["prompt"].startswith("<image>\nContext: Some context.\n" + problem["question"] + "\nA. ")
    assert asked["16"]["prompt"].endswith("\nAnswer with the option's letter from the given choices directly.")
    assert result["metrics"]["img_count"] == sum(a["prompt"].startswith("<image>") for a in result["answers"])
    # Both the result and the raw answers can be scored again.
    for file in ("result.json", "answers-0-of-1.jsonl"):
        assert score("scienceqa", data, tmp_path / "out" / "scienceqa" / file)["metrics"] == result["metrics"]
    with pytest.raises(ValueError, match="answers to scienceqa, not to mme"):
        score("mme", put_mme(tmp_path / "mme"), tmp_path / "out" / "scienceqa" / "answers-0-of-1.jsonl")


def test_textvqa_variants(tmp_path: Path) -> None:
    data = WRITERS["textvqa"](tmp_path / "data")
    with pytest.raises(ValueError, match=r"names OCR tokens.*use the variant no-ocr"):
        evaluate(Parrot(), ["textvqa"], data, tmp_path / "out")
    items = golden("textvqa")[0]["annotations"]["data"]
    tokens = [{"image_id": item["image_id"], "ocr_tokens": ["STOP", "24h"]} for item in items[1:]]
    (data / "TextVQA_Rosetta_OCR_v0.2_val.json").write_text(json.dumps({"data": tokens}))
    task, suffix = TASKS["textvqa"], "\nAnswer the question using a single word or phrase."
    question = items[1]["question"]
    assert task.examples(data, "ocr-after")[1].prompt == f"{question}\nReference OCR token: STOP, 24h{suffix}"
    assert task.examples(data, "ocr-before")[1].prompt == f"Reference OCR token: STOP, 24h\n{question}{suffix}"
    assert task.examples(data, "no-ocr")[1].prompt == question + suffix
    # Without a token the line stays.
    assert task.examples(data, "ocr-after")[0].prompt == f"{items[0]['question']}\nReference OCR token: {suffix}"
    (result,) = evaluate(Parrot(), ["textvqa"], data, tmp_path / "out", variants={"textvqa": "ocr-before"})
    assert result["run"]["variant"] == "ocr-before"


def test_check_says_what_is_missing(tmp_path: Path) -> None:
    WRITERS["pope"](tmp_path / "pope")
    checks = {c.task: c for c in check(tmp_path)}
    assert list(checks) == list(TASKS)
    assert not checks["pope"].ready  # annotations are there, pictures are not
    assert "25 of 25 pictures are missing, such as" in str(checks["pope"])
    assert "problems.json is missing" in str(checks["scienceqa"])
    assert "https://github.com/lupantech/ScienceQA" in str(checks["scienceqa"])
    WRITERS["mmbench"](tmp_path / "mmbench")
    (ready,) = check(tmp_path, ["mmbench"])
    assert ready.ready
    assert "388 questions" in str(ready)


def test_table_and_page(tmp_path: Path) -> None:
    data = tmp_path / "data"
    WRITERS["mmbench"](data / "mmbench")
    WRITERS["mme"](data / "mme")
    answers = iter("ABCD" * 1000)
    letters = Parrot(weights="letters")
    letters.answer = lambda requests: [next(answers) for _ in requests]  # type: ignore[method-assign]
    results = evaluate(letters, ["mme", "mmbench"], data, tmp_path / "one", options=Options(rule="current"))
    evaluate(Parrot(), ["mme", "mmbench"], data, tmp_path / "two")
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(results, "letters"))
    text = console.export_text()
    assert "1369.6" in text
    assert re.search(r"MME .* 372 .* 1369\.6 .* \d+\.\d ± \d\.\d", text)
    assert re.search(r"MMBench .* 388 .* 57\.0 .* \d\.\d +│", text)  # its questions have one picture: no spread
    assert "57.0" in text
    path = report(tmp_path / "one", tmp_path / "page.html", compare=tmp_path / "two", sample=3)
    html = path.read_text()
    assert html.count("<section>") == 2
    assert "data:image/jpeg;base64," in html
    assert "McNemar" in html
    two = json.loads((tmp_path / "two/mme/result.json").read_text())["headline"]
    one = results[0]["headline"]
    assert f'<td class="n"><b>{one:.1f}</b></td><td class="n">{two:.1f} ({one - two:+.1f})</td>' in html
    with pytest.raises(ValueError, match="sample is -3"):
        report(tmp_path / "one", tmp_path / "page.html", sample=-3)
    assert "rule version current" in html
    assert "(standard error, pictures drawn at random)" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert 'src="http' not in html
    with pytest.raises(ValueError, match="no result"):
        report(data, tmp_path / "page.html")


def test_page_escapes_what_models_say(tmp_path: Path) -> None:
    WRITERS["mme"](tmp_path / "data")
    rude = Parrot()
    rude.answer = lambda requests: ["<script>alert(1)</script>" for _ in requests]  # type: ignore[method-assign]
    evaluate(rude, ["mme"], tmp_path / "data", tmp_path / "out", limit=4)
    html = report(tmp_path / "out" / "mme", tmp_path / "page.html").read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_a_page_of_an_unknown_result_says_so(tmp_path: Path) -> None:
    data = WRITERS["pope"](tmp_path / "data")
    (result,) = evaluate(Parrot(), ["pope"], data, tmp_path / "out", limit=2)
    file = put_json(tmp_path / "result.json", result | {"task": "pop"})
    with pytest.raises(ValueError, match="tasks that are not known here: pop"):
        report(file, tmp_path / "page.html")
    for broken in (result | {"data": None}, result | {"answers": [1]}, {k: v for k, v in result.items() if k != "run"}):
        put_json(file, broken)
        with pytest.raises(ValueError, match=str(file)):
            report(file, tmp_path / "page.html")


def test_weights_hash(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights"):
        weights_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = weights_hash(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert weights_hash(tmp_path) != first


def test_page_of_own_data_finds_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "pictures" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "yes"}]
    data = put_json(tmp_path / "q" / "own.json", [{"id": 1, "image": "a.png", "conversations": turns}])
    evaluate(Parrot(), [OwnData("exact", tmp_path / "pictures")], data, tmp_path / "out")
    html = report(tmp_path / "out", tmp_path / "page.html").read_text()
    assert html.count('src="data:image/jpeg;base64,') == 1


def test_what_is_not_judged_is_not_compared(tmp_path: Path) -> None:
    data = WRITERS["mmvet"](tmp_path / "data")
    for name in ("one", "two"):
        evaluate(Parrot(weights=name), ["mmvet"], data, tmp_path / name)
    html = report(tmp_path / "one", tmp_path / "page.html", compare=tmp_path / "two").read_text()
    assert "McNemar" not in html
    assert "not judged" in html
