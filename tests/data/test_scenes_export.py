"""Scene sets on disk: the layouts of training files and benchmarks, and that nothing half-written stays."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vlmamba.data.scenes import export
from vlmamba.data.scenes.export import write
from vlmamba.data.scenes.sprites import available_things

COUNT = 24


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not available_things():
        pytest.skip("needs the Noto Color Emoji font")
    return write(tmp_path_factory.mktemp("scenes") / "all", "all", COUNT, 3, progress=False)


def picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        assert image.format == {".jpg": "JPEG", ".png": "PNG"}[path.suffix]
        assert image.size == (128, 128)
        return image


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_llava_records(sets: Path, stage: str) -> None:
    folder = sets / f"llava-{stage}"
    records = json.loads((folder / f"{stage}.json").read_text())
    assert len(records) == COUNT
    assert len({r["id"] for r in records}) == COUNT
    for record in records:
        turns = record["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert all(t["value"] for t in turns)
        marks = [t["value"].count("<image>") for t in turns]
        assert marks == [int("image" in record)] + [0] * (len(turns) - 1)
        if "image" in record:
            picture(folder / record["image"])
        if stage == "stage1":
            assert len(turns) == 2
            assert turns[0]["value"].startswith("<image>\n") or turns[0]["value"].endswith("\n<image>")
    assert stage == "stage1" or max(len(r["conversations"]) for r in records) >= 10


def test_stage_two_has_conversations_without_a_picture(tmp_path: Path) -> None:
    write(tmp_path / "two", "llava-stage2", 150, 1, progress=False)
    records = json.loads((tmp_path / "two" / "stage2.json").read_text())
    bare = [r for r in records if "image" not in r]
    assert 1 <= len(bare) <= 25
    assert not any("<image>" in t["value"] for r in bare for t in r["conversations"])


def test_vqav2(sets: Path) -> None:
    folder = sets / "vqav2"
    asked = json.loads((folder / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    notes = json.loads((folder / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    assert [q["question_id"] for q in asked] == [a["question_id"] for a in notes]
    assert len({q["question_id"] for q in asked}) == len(asked)
    for question, note in zip(asked, notes):
        picture(folder / f"val2014/COCO_val2014_{question['image_id']:012d}.jpg")
        assert len(note["answers"]) == 10
        said = Counter(a["answer"] for a in note["answers"])
        assert said.most_common(1)[0][0] == note["multiple_choice_answer"]
        assert note["answer_type"] in ("yes/no", "number", "other")
    assert {"yes/no", "number", "other"} == {n["answer_type"] for n in notes}
    tests = json.loads((folder / "v2_OpenEnded_mscoco_test2015_questions.json").read_text())["questions"]
    dev = json.loads((folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json").read_text())["questions"]
    assert {q["question_id"] for q in dev} < {q["question_id"] for q in tests}
    picture(folder / f"test2015/COCO_test2015_{tests[0]['image_id']:012d}.jpg")


def test_gqa(sets: Path) -> None:
    folder = sets / "gqa"
    table = json.loads((folder / "testdev_balanced_questions.json").read_text())
    for entry in table.values():
        picture(folder / f"images/{entry['imageId']}.jpg")
        assert entry["isBalanced"] is True
        assert set(entry["types"]) == {"structural", "semantic", "detailed"}
        assert entry["types"]["structural"] in ("query", "verify", "choose", "compare", "logical")
        assert set(entry["groups"]) == {"global", "local"}
        assert all({"operation", "argument", "dependencies"} == set(step) for step in entry["semantic"])
        for other in entry["entailed"]:
            assert table[other]["answer"] == entry["answer"]
            assert table[other]["imageId"] == entry["imageId"]
            assert table[other]["question"] != entry["question"]
    assert any(entry["entailed"] for entry in table.values())


def test_scienceqa(sets: Path) -> None:
    folder = sets / "scienceqa"
    problems = json.loads((folder / "problems.json").read_text())
    splits = json.loads((folder / "pid_splits.json").read_text())
    assert splits["test"] == list(problems)
    for number, problem in problems.items():
        assert 0 <= problem["answer"] < len(problem["choices"]) <= 5
        assert (problem["image"] is None) == bool(problem["hint"])
        if problem["image"]:
            picture(folder / f"images/test/{number}/image.png")
    assert {"question", "choices", "answer", "hint", "image", "task", "grade", "subject", "topic", "category", "skill",
            "lecture", "solution", "split"} == set(problem)  # fmt: skip
    assert {p["image"] for p in problems.values()} == {None, "image.png"}


def test_textvqa(sets: Path) -> None:
    folder = sets / "textvqa"
    data = json.loads((folder / "TextVQA_0.5.1_val.json").read_text())["data"]
    tokens = json.loads((folder / "TextVQA_Rosetta_OCR_v0.2_val.json").read_text())["data"]
    read = {t["image_id"]: " ".join(t["ocr_tokens"]).lower() for t in tokens}
    assert data
    for item in data:
        picture(folder / f"train_images/{item['image_id']}.jpg")
        assert len(item["answers"]) == 10
        assert item["image_id"] in read
        assert {"question_id", "question"} <= set(item)
    assert any(item["answers"][0] in read[item["image_id"]] for item in data)


def test_pope(sets: Path) -> None:
    for way in ("random", "popular", "adversarial"):
        lines = [json.loads(x) for x in (sets / f"pope/coco_pope_{way}.json").read_text().splitlines()]
        assert Counter(x["label"] for x in lines)["yes"] * 2 == len(lines) > 0
        assert [x["question_id"] for x in lines] == list(range(1, len(lines) + 1))
        for line in lines:
            assert set(line) == {"question_id", "image", "text", "label"}
            assert line["text"].startswith("Is there a")
            assert line["text"].endswith(" in the image?")
        picture(sets / "pope/val2014" / lines[0]["image"])


def test_mme(sets: Path) -> None:
    folder = sets / "mme"
    tasks = [path for path in folder.iterdir() if path.is_dir()]
    assert len(tasks) == 14
    for task in tasks:
        apart = task.name in ("artwork", "celebrity", "landmark", "posters", "scene")
        notes = sorted((task / "questions_answers_YN" if apart else task).glob("*.txt"))
        assert notes, task
        for note in notes:
            picture((task / "images" if apart else task) / f"{note.stem}.png")
            lines = [line.split("\t") for line in note.read_text().splitlines()]
            assert sorted(answer for _, answer in lines) == ["No", "Yes"]
            assert all(text.endswith(" Please answer yes or no.") for text, _ in lines)
            assert all(text.lower().count("please answer") == 1 for text, _ in lines)


def test_mmbench(sets: Path) -> None:
    with (sets / "mmbench/mmbench_dev_20230712.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0]) == ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source",
                             "l2-category", "comment", "split"]  # fmt: skip
    groups: dict[int, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(int(row["index"]) % 1_000_000, []).append(row)
    assert len(groups) == COUNT
    for copies in groups.values():
        options = [row[letter] for row in copies[:1] for letter in "ABCD" if row[letter]]
        assert [int(r["index"]) // 1_000_000 for r in copies] == list(range(len(options)))
        assert len({row[row["answer"]] for row in copies}) == 1
        assert len({row["answer"] for row in copies}) == len(options)
        Image.open(io.BytesIO(base64.b64decode(copies[0]["image"]))).load()


def test_mm_vet(sets: Path) -> None:
    table = json.loads((sets / "mm-vet/mm-vet.json").read_text())
    assert list(table) == [f"v1_{i}" for i in range(COUNT)]
    for entry in table.values():
        picture(sets / "mm-vet/images" / entry["imagename"])
        assert set(entry["capability"]) <= {"rec", "ocr", "know", "gen", "spat", "math"}
        assert entry["capability"]
        assert entry["answer"]


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, "llava-stage2", 12, 5, progress=False) for name in ("one", "two"))
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match="remove it or name another"):
        write(tmp_path / "set", "gqa", 3, 0)
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, source: object) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setitem(export.KINDS, "gqa", fail)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", "gqa", 3, 0, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "count", "told"), [("coco", 3, "unknown kind 'coco'"), ("gqa", 0, "count is 0")])
def test_bad_requests_are_named(tmp_path: Path, kind: str, count: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        write(tmp_path / "set", kind, count, 0)
    assert list(tmp_path.iterdir()) == []
