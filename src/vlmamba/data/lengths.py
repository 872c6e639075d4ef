"""The exact length of every sample of a source in tokens, measured once by parallel processes and kept in a file."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from vlmamba.data.encoding import Encoder
from vlmamba.data.processes import in_parallel
from vlmamba.data.records import BadSampleError
from vlmamba.data.sampling import Supply
from vlmamba.data.sources import Source

RULES = 1
"""Counts up whenever the same file, tokenizer and template come to give other lengths."""
_CHUNK = 1024


@dataclass(frozen=True)
class LengthTable:
    """Lengths of all samples of a source.

    Attributes:
        lengths: (n,) int32, tokens of the whole sample; 0 for one that can never be used.
        least: (n,) int32, the smallest `max_length` with which something of it can be learned.
    """

    lengths: np.ndarray
    least: np.ndarray

    def within(self, max_length: int) -> np.ndarray:
        """(n,) int64: tokens of each sample cut to `max_length`; 0 where nothing to learn is left."""
        usable = (self.lengths > 0) & (self.least <= max_length)
        return np.where(usable, np.minimum(self.lengths, max_length), 0).astype(np.int64)

    def save(self, file: Path) -> None:
        """Whole or not at all."""
        scratch = file.with_name(f".writing-{os.getpid()}-{file.name}")
        try:
            with scratch.open("wb") as handle:
                np.savez_compressed(handle, lengths=self.lengths, least=self.least)
            os.replace(scratch, file)
        finally:
            scratch.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: Path) -> LengthTable:
        with np.load(file) as stored:
            return cls(stored["lengths"], stored["least"])


def measured(source: Source, encoder: Encoder, workers: int = 0, cache: Path | None = None) -> Supply:
    """The source's supply with exact lengths; unchanged for an endless source, whose samples are made as they are read.

    Args:
        workers: processes that measure; 0 takes one per core.
        cache: folder that keeps the table where the source's own folder cannot be written to.
    """
    if source.supply.endless:
        return source.supply
    table = length_table(source, encoder, workers, cache)
    return replace(source.supply, lengths=table.within(encoder.max_length))


def length_table(source: Source, encoder: Encoder, workers: int = 0, cache: Path | None = None) -> LengthTable:
    """Reads the table from its file, or measures all samples and writes it.

    The file lies beside the data (or in `cache`) and is named after hashes of data, tokenizer and template, so a table
    is never taken for another. Processes of one machine that want the same table wait for the first to write it.
    """
    key = hashlib.sha256(f"{RULES}|{source.fingerprint()}|{encoder.fingerprint()}".encode()).hexdigest()[:16]
    name = f"{source.name.name}.lengths-{key}.npz"
    places = [folder for folder in (source.name.parent, cache) if folder is not None]
    with _one_at_a_time(key):
        for place in places:
            try:
                return LengthTable.load(place / name)
            except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error):  # not there, or damaged
                continue
        table = measure(source, encoder, workers)
        for place in places:
            try:
                place.mkdir(parents=True, exist_ok=True)
                table.save(place / name)
                break
            except OSError:  # a read-only data folder, a full disk: the next place, and at worst measured again
                continue
    return table


def measure(source: Source, encoder: Encoder, workers: int = 0) -> LengthTable:
    """Tokenises every sample of a source, in parallel, with a progress bar on a terminal."""
    size, started = source.supply.size, time.perf_counter()
    chunks = [range(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)]
    look = partial(_measure_chunk, source, encoder)
    parts = list(in_parallel(look, chunks, f"measuring {source.name.name}", workers))
    if len(chunks) > 1:
        seconds = time.perf_counter() - started
        print(f"{source.name}: {size:,} samples measured in {seconds:.0f} s", file=sys.stderr, flush=True)
    lengths, least = np.concatenate(parts, axis=1).astype(np.int32)
    return LengthTable(lengths, least)


def _measure_chunk(source: Source, encoder: Encoder, chunk: Iterable[int]) -> np.ndarray:
    """(2, n): length and least length; zeros for what cannot be used."""
    sizes = []
    for index in chunk:
        try:
            sizes.append(tuple(encoder.measure(source.outline(index))))
        except BadSampleError:  # counted and reported when its turn to be read comes
            sizes.append((0, 0))
    return np.array(sizes, dtype=np.int64).T


@contextmanager
def _one_at_a_time(key: str) -> Iterator[None]:
    """Holds other processes of this machine that want the same table; the lock goes with the process that holds it."""
    try:
        import fcntl
    except ImportError:  # not on Windows, where each process measures for itself
        yield
        return
    user = os.getuid() if hasattr(os, "getuid") else 0
    with (Path(tempfile.gettempdir()) / f"vlmamba-{user}-{key}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
