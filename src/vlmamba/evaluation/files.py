"""Reading benchmark folders: finding files, and errors that say what is wrong with them and where to get them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def find(folder: Path, *patterns: str) -> Path | None:
    """The first file or folder that one of the patterns (glob, relative to `folder`) names; None if none does."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            return path
    return None


def load_text(path: Path) -> str:
    """A text file; ValueError that names it where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


@contextmanager
def naming(what: str, place: Path) -> Iterator[None]:
    """A value of an unexpected kind, met deep in somebody's files, as a ValueError that names their place."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ValueError) and str(place) in str(error):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} in {place} are damaged, a value is not of the expected kind ({reason})") from error


def load_json(path: Path) -> Any:
    """A JSON file; ValueError with the place of the damage where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of 5000 digits, 100,000 brackets
        raise ValueError(f"{path} is damaged: not valid JSON ({error}); download it again") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def load_json_lines(path: Path) -> list[Any]:
    """A file of one JSON value per line; empty lines are skipped."""
    values = []
    for number, line in enumerate(load_text(path).split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is damaged: not valid JSON ({error})") from error
    return values


def require(record: Any, fields: Sequence[str], where: str) -> Mapping[str, Any]:
    """`record`, after making sure that it is an object with these fields."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(fields)}, found {_short(record)}")
    lacking = [field for field in fields if field not in record]
    if lacking:
        raise ValueError(f"{where}: the fields {', '.join(lacking)} are missing from {_short(record)}")
    return record


def require_texts(record: Any, fields: Sequence[str], where: str) -> Mapping[str, Any]:
    """`require`, of fields that are texts."""
    for field in fields:
        if not isinstance(require(record, fields, where)[field], str):
            raise ValueError(f"{where}: expected a text as {field}, found {_short(record[field])}")
    return record


def require_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: expected a list with at least one entry, found {_short(value)}")
    return value


def require_table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{where}: expected an object with at least one entry, found {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def image_root(folder: Path, candidates: Sequence[str], first: str) -> Path:
    """The first candidate sub-folder that holds the image `first`; else the first one that exists, else the first."""
    roots = [folder / name for name in candidates]
    for root in roots:
        if (root / first).is_file():
            return root
    return next((root for root in roots if root.is_dir()), roots[0])


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # Half a surrogate pair, which JSON can hold and UTF-8 cannot, is written as JSON escapes it.
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def dump_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> Path:
    """The path, after `write_atomically` of the value as JSON."""
    write_atomically(path, dump_json(value))
    return path


def fingerprint(texts: Iterable[str]) -> str:
    """The first 16 hex digits of the SHA-256 of some texts: names a data set or a set of prompts in a result."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode(errors="backslashreplace") + b"\0")
    return digest.hexdigest()[:16]
