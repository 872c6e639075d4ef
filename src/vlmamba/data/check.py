"""What is missing, broken or surplus in a data set, before a run finds out: every sample read, every picture's header
and end looked at, in parallel.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vlmamba.data.entries import Entries
from vlmamba.data.parquet import ParquetRows, is_parquet
from vlmamba.data.places import JSON_FILES, folder_of, place_of
from vlmamba.data.processes import cores, in_parallel
from vlmamba.data.records import PLACEHOLDER, SUFFIXES, BadSampleError, image_files, llava_record, locate, speeches
from vlmamba.models.processor import read_image

_CHUNK = 512
_TIMED = 48  # pictures that are decoded to know the pace
_PACES = {"100 Mbit/s": 12.5e6, "1 Gbit/s": 125e6}  # bytes per second


class Picture(NamedTuple):
    """What was found of one picture: `problem` is empty if it can be used."""

    path: str
    problem: str = ""
    bytes: int = 0
    renamed: bool = False
    disguised: bool = False


@dataclass
class Part:
    """One folder of pictures, as the file refers to it and as it lies on the disk."""

    referenced: int = 0
    found: int = 0
    bytes: int = 0
    missing: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    renamed: int = 0
    """Found under another suffix than the file says."""
    disguised: int = 0
    """Of another format than their suffix says."""
    surplus: int = 0
    surplus_bytes: int = 0


@dataclass
class Report:
    """What a check found.

    Attributes:
        samples: of the file; kinds: how many of them are of which kind (with an image, with an empty answer, ...).
        unusable: reason by the number of the sample in the file, for those that a run would leave out.
        parts: by folder.
        milliseconds: to decode a picture, on one core; None without pictures.
        seconds: that the check took.
    """

    file: str
    images: str | None
    samples: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    unusable: dict[int, str] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    milliseconds: float | None = None
    seconds: float = 0.0

    @property
    def bad_share(self) -> float:
        return len(self.unusable) / max(1, self.samples)

    def plain(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(replace(self, kinds=Counter())) | {"kinds": dict(self.kinds), "bad_share": self.bad_share}


def check(file: str, images: str | None, workers: int = 0, decode: bool = False) -> Report:
    """Reads every sample, and of every picture the header and the end (whole pictures with `decode`).

    Args:
        workers: processes; 0 takes two per core, since most of the time is waiting for the disk.
        decode: decode every picture: finds damage in the middle of a file too, and takes as long as an epoch's reading.

    Raises:
        ValueError: the file is none of samples, or there is no such folder.
    """
    if images is not None and not Path(images).is_dir():
        raise ValueError(f"{images}: no such folder of images")
    if not Path(file).exists() and Path(file).name in JSON_FILES:
        raise ValueError(f"{file}: no such file; get it from {JSON_FILES[Path(file).name]}")
    started, report, workers = time.perf_counter(), Report(file, images), workers or 2 * cores()
    if is_parquet(file):
        _check_rows(ParquetRows(file), report, workers)
    else:
        users = _check_entries(Entries(file), report, workers)
        if images is not None:
            folder = Path(images)
            _check_pictures(folder, users, report, workers, decode)
            _count_surplus(folder, users, report)
            report.milliseconds = _pace([folder / path for path in users])
    if not report.samples:
        raise ValueError(f"{file}: holds no samples")
    report.seconds = time.perf_counter() - started
    return report


# Samples ------------------------------------------------------------------------------------------------------------


def _check_entries(entries: Entries, report: Report, workers: int) -> dict[str, list[int]]:
    """Fills in what the samples themselves tell; returns the pictures and the samples that need them."""
    report.samples = len(entries)
    users: dict[str, list[int]] = defaultdict(list)
    for found in in_parallel(partial(_look_at_entries, entries), _chunks(range(len(entries))), "samples", workers):
        for index, kinds, problem, pictures in found:
            report.kinds.update(kinds)
            if problem:
                report.unusable[index] = problem
            else:
                for picture in pictures:
                    users[picture].append(index)
    return users


def _look_at_entries(entries: Entries, chunk: Sequence[int]) -> list[tuple[int, list[str], str, list[str]]]:
    """Number, kinds, problem (empty if there is none) and pictures of each sample."""
    found = []
    for index in chunk:
        kinds: list[str] = []
        files: list[str] = []
        problem = ""
        try:
            entry = entries[index]
            if isinstance(entry, dict):
                files = image_files(entry, str(entry.get("id", index)))
                kinds = _kinds(entry, files)
            llava_record(entry, index, Path())
        except BadSampleError as error:
            problem = str(error)
        found.append((index, kinds, problem, files))
    return found


def _kinds(entry: dict[str, Any], files: list[str]) -> list[str]:
    """What a sample is, and what dirt it has that reading puts right."""
    turns = list(speeches(entry.get("conversations") or entry.get("messages") or [], str(entry.get("id"))))
    human = [text for speaker, text in turns if speaker == "human"]
    found = {
        "without image": not files,
        "with one image": len(files) == 1,
        "with several images": len(files) > 1,
        "of several turns": len(human) > 1,
        "first turn not human": bool(turns) and turns[0][0] != "human",
        "an empty answer": any(speaker == "gpt" and not text.strip() for speaker, text in turns),
        f"{PLACEHOLDER} not at the front": bool(human and files) and not human[0].startswith(PLACEHOLDER),
        f"{PLACEHOLDER} in a later turn": any(PLACEHOLDER in text for text in human[1:]),
    }
    return [kind for kind, holds in found.items() if holds]


def _check_rows(rows: ParquetRows, report: Report, workers: int) -> None:
    """A parquet's samples, pictures included: they are decoded, being at hand."""
    report.samples = len(rows)
    groups = [range(end - size, end) for end, size in zip(accumulate(rows.sizes), rows.sizes, strict=True)]
    for found in in_parallel(partial(_look_at_rows, rows), groups, "row groups", workers):
        for index, images, problem in found:
            report.kinds.update([("without image", "with one image", "with several images")[min(images, 2)]])
            if problem:
                report.unusable[index] = problem


def _look_at_rows(rows: ParquetRows, chunk: Sequence[int]) -> list[tuple[int, int, str]]:
    """Number, images and problem of each row."""
    found = []
    for index in chunk:
        images, problem = 0, ""
        try:
            record = rows.record(index)
            images = len(record.images)
            for image in record.images:
                read_image(image)
        except BadSampleError as error:
            problem = str(error)
        except ValueError as error:
            problem = f"{record.id}: {error}"
        found.append((index, images, problem))
    return found


# Pictures -----------------------------------------------------------------------------------------------------------


def _check_pictures(folder: Path, users: dict[str, list[int]], report: Report, workers: int, decode: bool) -> None:
    parts: dict[str, Part] = defaultdict(Part)
    look = partial(_look_at_pictures, folder, decode)
    for found in in_parallel(look, _chunks(list(users)), "pictures", workers):
        for picture in found:
            part = parts[folder_of(picture.path, Path(report.file).name)]
            part.referenced += 1
            part.found += not picture.problem
            part.bytes += picture.bytes
            part.renamed += picture.renamed
            part.disguised += picture.disguised
            if picture.problem:
                if picture.problem == "missing":
                    part.missing.append(picture.path)
                else:
                    part.broken[picture.path] = picture.problem
                for index in users[picture.path]:
                    report.unusable.setdefault(index, f"sample {index}: {picture.path}: {picture.problem}")
    report.parts = dict(sorted(parts.items()))


def _look_at_pictures(folder: Path, decode: bool, chunk: Sequence[str]) -> list[Picture]:
    return [_look_at_picture(folder, path, decode) for path in chunk]


def _look_at_picture(folder: Path, path: str, decode: bool) -> Picture:
    """Header and end of one file. Where they leave a doubt, it is decoded, as a run would."""
    asked = folder / path
    file = locate(asked)
    try:
        size = file.stat().st_size
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return Picture(path, "missing")
    try:
        with file.open("rb") as handle, Image.open(handle) as image:
            # Some cameras put several pictures into a JPEG, which Pillow then calls MPO.
            kind, (width, height) = (image.format or "").replace("MPO", "JPEG"), image.size
            handle.seek(max(0, size - 64))
            whole = _ends_well(kind, handle.read(), size)
            disguised = file.suffix.lower() not in _suffixes_of(kind)
        if decode or not whole or width * height > 8e7:
            read_image(file)
    except Exception:  # decoders raise nearly anything; the reader decides
        try:
            read_image(file)
        except ValueError as problem:  # its words, without the name, which is known
            return Picture(path, str(problem).replace(str(file), "").strip(), size, file != asked)
        return Picture(path, "", size, file != asked)
    return Picture(path, "", size, file != asked, disguised)


def _ends_well(kind: str, end: bytes, size: int) -> bool:
    """Whether a file ends as one of its format does; a download that broke off does not."""
    marks = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b"\x3b"}
    return size > 0 and kind in marks and marks[kind] in end


@cache
def _suffixes_of(kind: str) -> tuple[str, ...]:
    Image.init()
    return tuple(suffix for suffix, format in Image.EXTENSION.items() if format == kind)


def _count_surplus(folder: Path, users: dict[str, list[int]], report: Report) -> None:
    """Pictures that no sample asks for, in the folders that hold one that is asked for: nowhere else is looked."""
    file = Path(report.file).name
    places = {os.path.dirname(os.path.normpath(path)): report.parts[folder_of(path, file)] for path in users}
    known = {os.path.splitext(os.path.normpath(path))[0] for path in users}
    for place, part in places.items():
        if not os.path.isdir(folder / place):
            continue
        _, _, names = next(os.walk(folder / place), ("", [], []))
        for name in names:
            stem, suffix = os.path.splitext(os.path.join(place, name))
            if suffix in SUFFIXES and stem not in known:
                part.surplus += 1
                part.surplus_bytes += os.lstat(folder / place / name).st_size


def _pace(files: list[Path]) -> float | None:
    """Milliseconds that a core takes to decode a picture: the mean of the middle half of those tried."""
    times = []
    for file in files[:: max(1, len(files) // _TIMED)]:
        started = time.perf_counter()
        try:
            read_image(locate(file))
        except ValueError:
            continue
        times.append(time.perf_counter() - started)
    middle = sorted(times)[len(times) // 4 : max(1, 3 * len(times) // 4)]
    return 1000 * sum(middle) / len(middle) if middle else None


# Telling ------------------------------------------------------------------------------------------------------------


def tell(report: Report, limit: float) -> Iterator[str]:
    """The report in words, a line each."""
    yield f"{report.file}: {report.samples:,} samples, looked at in {report.seconds:.0f} s"
    for kind, count in sorted(report.kinds.items(), key=lambda item: -item[1]):
        yield f"  {count:>9,}  {kind}"
    lacking = 0.0
    for folder, part in report.parts.items():
        yield f"{folder or 'pictures'}/: {part.found:,} of {part.referenced:,} pictures, {part.bytes / 1e9:.2f} GB"
        yield from _tell_part(part)
        place = place_of(folder, Path(report.file).name)
        if place is not None and part.missing:
            lacking += place.gigabytes
            times = ", ".join(f"{place.gigabytes * 1e9 / pace / 3600:.1f} h at {name}" for name, pace in _PACES.items())
            yield f"  get {place.name} ({place.page}):"
            yield f"    {place.archive}"
            yield f"    {place.files:,} files, {place.gigabytes:g} GB, {times}; {place.how}"
    if report.images is None and not is_parquet(report.file):
        yield "pictures were not looked at; name their folder with --images DIR"
    if lacking:
        yield f"to download: {lacking:.1f} GB; room for {2 * lacking:.0f} GB, half of it until all is unpacked"
    if report.milliseconds is not None:
        rate = 1000 / report.milliseconds
        yield f"decoding takes {report.milliseconds:.1f} ms a picture: {rate:,.0f} a second and core, before resizing"
    verdict = "fine" if report.bad_share <= limit else "TOO MANY"
    share = f"{report.bad_share:.2%}; a run allows {limit:.2%}"
    yield f"{len(report.unusable):,} samples cannot be used ({share}): {verdict}"
    for reason in list(report.unusable.values())[:5]:
        yield f"  {reason}"
    if len(report.unusable) > 5:
        yield f"  and {len(report.unusable) - 5:,} more; --report FILE lists them all"


def _tell_part(part: Part) -> Iterator[str]:
    if part.missing:
        yield f"  {len(part.missing):>9,}  missing, such as {part.missing[0]}"
    if part.broken:
        path, problem = next(iter(part.broken.items()))
        yield f"  {len(part.broken):>9,}  broken, such as {path}: {problem}"
    if part.renamed:
        yield f"  {part.renamed:>9,}  under another suffix (found all the same)"
    if part.disguised:
        yield f"  {part.disguised:>9,}  of another format than their suffix (read by content)"
    if part.surplus:
        yield f"  {part.surplus:>9,}  surplus, {part.surplus_bytes / 1e9:.2f} GB: no sample asks for them"


def _chunks(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
