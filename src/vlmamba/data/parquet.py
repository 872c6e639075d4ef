"""Hugging Face parquet with images inside: rows by number, row groups read when needed, a few kept."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from vlmamba.data.records import BadSampleError, Picture, Record, conversation_record

MEMORY = 256 * 2**20
"""Bytes of row groups (as they lie in the file) that a process keeps, and that samples are shuffled among."""
_FOOTER = 2**16  # bytes at a file's end that name its content: schema, statistics, places of all row groups


class ParquetRows:
    """Rows of one file, of the files of a folder, or of those that a pattern (`data/train-*.parquet`) matches.

    Understood are the columns `image` or `images` (bytes, a path, or Hugging Face's struct of both, one or a list) and
    `conversations` (from, value), `messages` (role, content) or `texts` (user, assistant); `id` if there is one.

    Raises:
        ValueError: no such files, other columns, or pyarrow is not installed.
    """

    def __init__(self, pattern: str | Path):
        arrow = _arrow()
        self.files = matching(str(pattern))
        self._open: tuple[int, Path, Any] | None = None  # of which process, which file
        self._groups: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()  # by number, the last one used at the end
        self._texts: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        places, sizes, weights = [], [], []
        for file in self.files:
            try:
                data = arrow.parquet.ParquetFile(file).metadata
            except (arrow.ArrowException, OSError) as error:
                raise ValueError(f"{file}: is not a parquet file that can be read: {error}") from None
            for group in range(data.num_row_groups):
                rows = data.row_group(group)
                places.append((file, group))
                sizes.append(rows.num_rows)
                weights.append(sum(rows.column(c).total_compressed_size for c in range(data.num_columns)))
        self._places, self.sizes = places, tuple(sizes)
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.span = max(1, int(MEMORY / max(1.0, float(np.mean(weights or [1])))))
        schema = arrow.parquet.ParquetFile(self.files[0]).schema_arrow
        self._image, self._talk, self._named = _columns(list(schema.names), self.files[0])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def record(self, index: int, pictures: bool = True) -> Record:
        """Row `index`; without `pictures`, their places are kept and their content is not read."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = self._group(group, pictures)[index - int(self._starts[group])]
        name = str(row.get("id") or index)
        found = row.get(self._image) if self._image else None
        found = found if isinstance(found, list) else [] if found is None else [found]
        images = [_picture(image, self.files[0].parent, name) if pictures else b"" for image in found]
        talk = row.get(self._talk) or []
        if self._talk == "texts":
            sides = (("human", "user"), ("gpt", "assistant"))
            talk = [{"from": who, "value": turn.get(column)} for turn in talk for who, column in sides]
            talk = [{**talk[0], "value": "<image>" * len(images) + str(talk[0]["value"])}, *talk[1:]] if talk else []
        return conversation_record(name, talk, images)

    def fingerprint(self) -> str:
        """A hash of names, sizes and footers: whole files with images would take minutes to read."""
        digest = hashlib.sha256()
        for file in self.files:
            size = file.stat().st_size
            with file.open("rb") as handle:
                handle.seek(max(0, size - _FOOTER))
                digest.update(f"{file.name} {size}".encode() + handle.read())
        return digest.hexdigest()

    def _group(self, number: int, pictures: bool) -> list[dict[str, Any]]:
        kept = self._groups if pictures else self._texts
        if number not in kept:
            while len(kept) >= (self.span if pictures else 1):
                kept.popitem(last=False)
            kept[number] = self._read(number, pictures)
        kept.move_to_end(number)
        return kept[number]

    def _read(self, number: int, pictures: bool) -> list[dict[str, Any]]:
        file, group = self._places[number]
        arrow = _arrow()
        if self._open is None or self._open[:2] != (os.getpid(), file):
            self._open = (os.getpid(), file, arrow.parquet.ParquetFile(file))
        opened = self._open[2]
        columns = [self._talk, *(["id"] if self._named else []), *([self._image] if self._image else [])]
        if not pictures and self._image:  # of a picture's struct the path says whether it is there
            leaves = [opened.schema.column(i).path for i in range(len(opened.schema))]
            leaf = [name for name in leaves if name.startswith(self._image + ".") and name.endswith("path")]
            columns = [*columns[:-1], *(leaf or [self._image])]
        try:
            return list(opened.read_row_group(group, columns=columns, use_threads=False).to_pylist())
        except (arrow.ArrowException, OSError) as error:
            raise BadSampleError(f"row group {group} of {file} is damaged: {error}") from None

    def __getstate__(self) -> dict[str, Any]:
        # Open files and what was read from them stay in their process.
        return self.__dict__ | {"_open": None, "_groups": OrderedDict(), "_texts": OrderedDict()}


def is_parquet(name: str) -> bool:
    """Whether a source's name means parquet: such a file, a pattern of them, or a folder that holds some."""
    return name.endswith(".parquet") or (Path(name).is_dir() and any(Path(name).glob("*.parquet")))


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("parquet files need pyarrow: pip install 'vlmamba[parquet]'") from None
    return pyarrow


def matching(pattern: str) -> list[Path]:
    """The files that a source's name means, in order; ValueError if there are none."""
    found = sorted(Path(pattern).glob("*.parquet")) if Path(pattern).is_dir() else sorted(map(Path, glob(pattern)))
    if not found:
        raise ValueError(f"{pattern}: no such parquet file")
    return found


def _columns(names: list[str], file: Path) -> tuple[str | None, str, bool]:
    """The columns of pictures and of talk, and whether rows have an id."""
    talk = next((name for name in ("conversations", "messages", "texts") if name in names), None)
    if talk is None:
        raise ValueError(f"{file}: has columns {', '.join(names)}; expected conversations, messages or texts")
    return next((name for name in ("image", "images") if name in names), None), talk, "id" in names


def _picture(image: Any, folder: Path, name: str) -> Picture:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and image:
        return folder / image
    if isinstance(image, bytes) and image:
        return image
    raise BadSampleError(f"{name}: its image is empty")
