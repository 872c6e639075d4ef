"""Writing scenes as files: training sets and one set for each of the eight benchmarks, in their own layouts.

A set is written beside its place and moved there when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

from rich.progress import Progress

from vlmamba.data.scenes import layouts
from vlmamba.data.scenes.layouts import Source

KINDS: dict[str, Callable[[Path, Source], None]] = {
    "llava-stage1": layouts.llava_stage1,
    "llava-stage2": layouts.llava_stage2,
    "vqav2": layouts.vqav2,
    "gqa": layouts.gqa,
    "scienceqa": layouts.scienceqa,
    "textvqa": layouts.textvqa,
    "pope": layouts.pope,
    "mme": layouts.mme,
    "mmbench": layouts.mmbench,
    "mm-vet": layouts.mm_vet,
}

MARK = "drawn.json"
"""The file by which a set is known from the benchmark whose layout it has; it says how it was drawn."""


def write(
    directory: str | Path,
    kind: str,
    count: int,
    seed: int,
    *,
    size: int = 128,
    split: str | None = None,
    progress: bool = True,
) -> Path:
    """Write `count` pictures with their questions to `directory` as a set of `kind`; "all" writes every kind, each to a
    folder of its name. Returns the directory.

    `split` (default: "train" for LLaVA files, "test" for benchmarks) is a split of the World. Raises ValueError for an
    unknown kind, a count below 1, or a directory that is there already.
    """
    target = Path(directory)
    if kind != "all" and kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; expected all or one of {', '.join(KINDS)}")
    if count < 1:
        raise ValueError(f"count is {count}; expected 1 or more pictures")
    if target.exists():
        raise ValueError(f"{target} is there already; remove it or name another directory")
    kinds = list(KINDS) if kind == "all" else [kind]
    with Progress(disable=not progress) as bar, _complete(target) as unfinished:
        for name in kinds:
            folder = unfinished / name if kind == "all" else unfinished
            folder.mkdir(exist_ok=True)
            task = bar.add_task(name, total=count)
            which = split or ("train" if name.startswith("llava") else "test")
            source = Source(seed, which, size, count, Random(f"{seed}/{name}"), partial(bar.advance, task))
            KINDS[name](folder, source)
            if not name.startswith("llava"):
                facts = {"kind": name, "count": count, "seed": seed, "size": size, "split": which}
                (folder / MARK).write_text(json.dumps(facts))
    return target


@contextmanager
def _complete(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name on success and goes away on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    folder.chmod(0o755)
    try:
        yield folder
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
