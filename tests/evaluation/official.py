"""The goldens' made-up data sets, written out in the layouts that users download."""

from __future__ import annotations

import base64
import io
import json
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


def put_vqav2(folder: Path) -> Path:
    inputs, _ = golden("vqav2")
    put_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", inputs["questions"])
    put_json(folder / "v2_mscoco_val2014_annotations.json", inputs["annotations"])
    return folder


def put_textvqa(folder: Path) -> Path:
    inputs, _ = golden("textvqa")
    put_json(folder / "TextVQA_0.5.1_val.json", inputs["annotations"])
    return folder


def put_gqa(folder: Path, choices: bool = False) -> Path:
    inputs, _ = golden("gqa")
    put_json(folder / "testdev_balanced_questions.json", inputs["questions"])
    if choices:
        put_json(folder / "testdev_choices.json", inputs["choices"])
    return folder


def put_scienceqa(folder: Path) -> Path:
    inputs, _ = golden("scienceqa")
    put_json(folder / "problems.json", inputs["problems"])
    put_json(folder / "pid_splits.json", inputs["pid_splits"])
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


def put_mmvet(folder: Path) -> Path:
    inputs, _ = golden("mmvet")
    put_json(folder / "mm-vet.json", inputs["metadata"])
    return folder


WRITERS = {
    "vqav2": put_vqav2,
    "textvqa": put_textvqa,
    "gqa": put_gqa,
    "scienceqa": put_scienceqa,
    "pope": put_pope,
    "mme": put_mme,
    "mmbench": put_mmbench,
    "mmvet": put_mmvet,
}


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
