"""The goldens' made-up data sets, written out in the layouts that users download."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

GOLDENS = Path(__file__).parent / "goldens"


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    data = json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))
    return data["inputs"], data["expected"]


def put_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def put_lines(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 30, 30)).save(buffer, "PNG")
    return buffer.getvalue()


# Of the benchmarks that are JSON files: which part of the golden's inputs each file holds.
FILES = {
    "vqav2": {
        "v2_OpenEnded_mscoco_val2014_questions.json": "questions",
        "v2_mscoco_val2014_annotations.json": "annotations",
    },
    "textvqa": {"TextVQA_0.5.1_val.json": "annotations"},
    "gqa": {"testdev_balanced_questions.json": "questions"},
    "scienceqa": {"problems.json": "problems", "pid_splits.json": "pid_splits"},
    "mmvet": {"mm-vet.json": "metadata"},
}


def put_files(name: str, folder: Path) -> Path:
    inputs, _ = golden(name)
    for file, part in FILES[name].items():
        put_json(folder / file, inputs[part])
    return folder


def put_pope(folder: Path) -> Path:
    inputs, _ = golden("pope")
    for name, lines in inputs["annotation_files"].items():
        put_lines(folder / name, lines)
    return folder


def put_mme(folder: Path) -> Path:
    inputs, _ = golden("mme")
    for name, text in inputs["gt_files"].items():
        path = folder / "MME_Benchmark_release_version" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if path.parent.name == "questions_answers_YN":
            (path.parent.parent / "images").mkdir(exist_ok=True)
    return folder


def put_mmbench(folder: Path) -> Path:
    inputs, _ = golden("mmbench")
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
    image = base64.b64encode(picture()).decode()
    lines = ["\t".join(columns)]
    for row in inputs["rows"]:
        cells = {**row, "image": image}
        lines.append("\t".join("" if cells[c] is None else str(cells[c]) for c in columns))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mmbench_dev_20230712.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {name: partial(put_files, name) for name in FILES}
WRITERS |= {"pope": put_pope, "mme": put_mme, "mmbench": put_mmbench}


def llava_answers(name: str) -> list[dict[str, Any]]:
    """The goldens' answers as LLaVA's scripts write them."""
    inputs, _ = golden(name)
    if name == "vqav2":
        asked = {q["question_id"]: q["question"] for q in inputs["questions"]["questions"]}
        return [
            {"question_id": r["question_id"], "prompt": asked[r["question_id"]], "text": r["answer"]}
            for r in inputs["results"]
        ]
    if name == "mmbench":
        return [
            {"question_id": r["index"], "round_id": 0, "prompt": r["question"], "text": r["prediction"]}
            for r in inputs["rows"]
        ]
    if name == "mmvet":  # LLaVA's script counts without "v1_"
        return [
            {"question_id": int(k[3:]), "prompt": inputs["metadata"][k]["question"], "text": v}
            for k, v in inputs["predictions"].items()
        ]
    return inputs.get("answers") or inputs.get("predictions") or inputs["results"]
