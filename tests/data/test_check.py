"""`vlmamba data check`: what it finds in a dirty file, and what it says of LLaVA's own."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from dirt import GOOD, talk
from PIL import Image

from vlmamba.cli import main
from vlmamba.data import check as module
from vlmamba.data.check import check, tell
from vlmamba.data.places import MIX_665K
from vlmamba.data.records import BadSampleError, llava_record
from vlmamba.data.sources import LlavaConfig, LlavaSource


@pytest.mark.parametrize("chunk", [512, 3])
def test_a_dirty_file(dirty: Path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)  # 3: with worker processes
    report = check(str(dirty / "data.json"), str(dirty), workers=2)
    assert report.samples == 20
    assert set(report.unusable) == set(range(len(GOOD), 20))
    coco, ocr = report.parts["coco"], report.parts["ocr"]
    assert coco.missing == ["coco/nowhere.jpg"]
    assert set(coco.broken) == {"coco/cut.jpg", "coco/page.jpg", "coco/zero.jpg"}
    assert "truncated" in coco.broken["coco/cut.jpg"]
    assert (coco.referenced, coco.found, coco.surplus) == (6, 2, 1)
    assert coco.surplus_bytes == (dirty / "coco/surplus.jpg").stat().st_size
    assert (ocr.referenced, ocr.found, ocr.renamed, ocr.disguised, ocr.surplus) == (2, 2, 1, 1, 0)
    assert report.kinds["an empty answer"] == 2
    assert report.kinds["first turn not human"] == 1
    assert report.kinds["with several images"] == 1
    assert report.kinds["<image> in a later turn"] == 2
    assert report.kinds["<image> not at the front"] == 3
    assert report.milliseconds is not None
    text = "\n".join(tell(report, 0.01))
    assert "10 samples cannot be used (50.00%; a run allows 1.00%): TOO MANY" in text
    assert "coco/: 2 of 6 pictures" in text
    assert "1  missing, such as coco/nowhere.jpg" in text


def test_what_it_calls_unusable_is_what_a_run_leaves_out(dirty: Path, encoder) -> None:
    source = LlavaSource(LlavaConfig(str(dirty / "data.json"), str(dirty)))
    left_out = set()
    for index in range(source.supply.size):
        try:
            encoder(source.record(index))
        except BadSampleError:
            left_out.add(index)
    assert set(check(str(dirty / "data.json"), str(dirty)).unusable) == left_out


def save(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return name


def encoded(kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 48), 80).convert("RGB").save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_every_cut_is_found_by_the_end_of_the_file_alone(tmp_path: Path, kind: str) -> None:
    whole = encoded(kind)
    suffix = kind.lower()
    names = [save(tmp_path, f"whole.{suffix}", whole), save(tmp_path, f"more.{suffix}", whole + bytes(100))]
    names += [save(tmp_path, f"{cut}.{suffix}", whole[: len(whole) * cut // 10]) for cut in (9, 5, 1)]
    turns = talk("<image>What?", "This")
    (tmp_path / "a.json").write_text(json.dumps([{"image": name, "conversations": turns} for name in names]))
    report = check(str(tmp_path / "a.json"), str(tmp_path))
    assert set(report.unusable) == {2, 3, 4}
    assert set(check(str(tmp_path / "a.json"), str(tmp_path), decode=True).unusable) == {2, 3, 4}


def test_damage_inside_is_found_by_decoding(tmp_path: Path) -> None:
    whole = bytearray(encoded("PNG"))
    whole[len(whole) // 2] ^= 255
    (tmp_path / "a.json").write_text(
        json.dumps([{"image": save(tmp_path, "a.png", bytes(whole)), "conversations": talk("<image>What?", "This")}])
    )
    assert not check(str(tmp_path / "a.json"), str(tmp_path)).unusable
    assert check(str(tmp_path / "a.json"), str(tmp_path), decode=True).unusable


def test_names_that_no_system_takes_are_missing_pictures(tmp_path: Path, encoder) -> None:
    names = ["x" * 300 + ".jpg", "a\0b.jpg", "a\0b/c.jpg"]
    entries = [{"image": name, "conversations": talk("<image>What?", "This")} for name in names]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    assert set(check(str(tmp_path / "a.json"), str(tmp_path)).unusable) == {0, 1, 2}
    for entry in entries:
        with pytest.raises(BadSampleError):
            encoder(llava_record(entry, 0, tmp_path))


def test_whatever_a_decoder_raises_is_a_broken_picture(tmp_path: Path, monkeypatch) -> None:
    """Damaged AVIF is a RuntimeError as soon as it is opened, whatever the file's suffix."""
    entry = {"image": save(tmp_path, "a.jpg", encoded("JPEG")), "conversations": talk("<image>What?", "This")}
    (tmp_path / "a.json").write_text(json.dumps([entry]))

    def fail(*_, **__) -> None:
        raise RuntimeError("Failed to decode image: Invalid ftyp")

    monkeypatch.setattr(Image, "open", fail)
    report = check(str(tmp_path / "a.json"), str(tmp_path))
    assert "cannot be read: Failed to decode image" in report.unusable[0]


def test_llava_s_mix_says_where_its_parts_are(tmp_path: Path, capsys) -> None:
    images = [f"{place.folder}/{number}.jpg" for place in MIX_665K for number in (1, 2)]
    entries = [{"id": "same", "image": image, "conversations": talk("<image>What?", "This")} for image in images]
    file = tmp_path / "llava_v1_5_mix665k.json"
    file.write_text(json.dumps(entries))
    (tmp_path / "coco/train2017").mkdir(parents=True)
    (tmp_path / images[0]).write_bytes(encoded("JPEG"))
    assert main(["data", "check", str(file), "--images", str(tmp_path), "--report", str(tmp_path / "r.json")]) == 1
    said = capsys.readouterr().out
    for place in MIX_665K:
        assert place.archive in said
        assert place.page in said
    assert "coco/train2017/: 1 of 2 pictures" in said
    assert "to download: 67.9 GB; room for 136 GB" in said
    assert "19.3 GB, 0.4 h at 100 Mbit/s" in said
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["samples"] == 12
    assert len(stored["unusable"]) == 11
    assert stored["parts"]["vg/VG_100K_2"]["missing"] == ["vg/VG_100K_2/1.jpg", "vg/VG_100K_2/2.jpg"]
    assert stored["kinds"]["with one image"] == 12


def test_pretraining_pictures_are_one_download(tmp_path: Path, capsys) -> None:
    """However many numbered folders they lie in."""
    names = [f"{folder:05d}/{folder:05d}{number}.jpg" for folder in (0, 1, 453) for number in (1, 2)]
    for name in [names[0], "00000/surplus.jpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded("JPEG"))
    file = tmp_path / "blip_laion_cc_sbu_558k.json"
    file.write_text(json.dumps([{"image": n, "conversations": talk("What?\n<image>", "This")} for n in names]))
    assert main(["data", "check", str(file), "--images", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "pictures/: 1 of 6 pictures" in said
    assert "1  surplus" in said
    assert said.count("LLaVA-Pretrain/resolve/main/images.zip") == 1
    assert "to download: 27.4 GB; room for 55 GB" in said


def test_only_folders_that_samples_name_are_looked_at(tmp_path: Path) -> None:
    """Paths may lead out of the image folder, or be absolute: what lies around there is nobody's surplus."""
    named = ["here/a.jpg", "./here/b.jpg", "../beside/c.jpg", f"{tmp_path}/far/d.jpg"]
    others = ["set/here/extra.jpg", "beside/extra.jpg", "beside/deeper/e.jpg", "private/f.jpg", "g.jpg", "set/h.jpg"]
    for name in [*(f"set/{name}" for name in named[:3]), "far/d.jpg", *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded("JPEG"))
    file = tmp_path / "set" / "data.json"
    file.write_text(json.dumps([{"image": n, "conversations": talk("What?\n<image>", "This")} for n in named]))
    report = check(str(file), str(tmp_path / "set"))
    assert not report.unusable
    assert {name: part.surplus for name, part in report.parts.items()} == {"here": 1, "..": 1, "/": 0}


def test_a_clean_file_passes(tmp_path: Path, capsys) -> None:
    entries = [{"conversations": talk("Hi", "Hello")}, {"image": "a.jpg", "conversations": talk("<image>Hi", "Hello")}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG"))
    assert main(["data", "check", str(tmp_path / "a.jsonl"), "--images", str(tmp_path)]) == 0
    assert "0 samples cannot be used" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "a.jsonl")]) == 0
    assert "pictures were not looked at" in capsys.readouterr().out


def test_mistakes(tmp_path: Path, capsys) -> None:
    assert main(["data", "check", str(tmp_path / "llava_v1_5_mix665k.json")]) == 2
    assert "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("[]")
    assert main(["data", "check", str(tmp_path / "a.json"), "--images", str(tmp_path / "none")]) == 2
    assert "no such folder of images" in capsys.readouterr().err


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"id": str(i), "image": {"bytes": content, "path": None}, "conversations": talk("<image>What?", "This")}
        for i, content in enumerate([encoded("JPEG"), b"none", encoded("PNG")[:200]])
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    report = check(str(tmp_path), None)
    assert report.samples == 3
    assert set(report.unusable) == {1, 2}


def test_a_file_without_samples_is_not_fine(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match=r"none\.json: holds no samples"):
        check(str(tmp_path / "none.json"), None)
