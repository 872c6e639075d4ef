"""The engine: many chats that come at one time, each with a photograph, through `vlmamba.inference`.

All of it counts: pictures scaled on eight threads, prompts read in stretches, tokens drawn, turned into text and handed
over. "First token": from the moment that the first chat is sent to the moment that a chat's first piece comes, the
median over chats.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import models
from benchmarks.bench import Bench
from benchmarks.evaluation import photographs, processor_of, questions
from benchmarks.timing import Timing
from vlmamba.inference import Engine, Piece, Sampling
from vlmamba.models.images import read_image

NEW = 64
# Chats at one time, questions on each picture.
CASES = ((1, 1), (8, 1), (64, 1), (64, 8))


def run(bench: Bench) -> None:
    size = "toy" if bench.toy else "2.8b"
    with bench.row_of(f"engine {size}", models.OURS, "all"), tempfile.TemporaryDirectory() as folder:
        model = models.our_vlm(size, bench.device, torch.float32 if bench.toy else torch.bfloat16)
        photographs(Path(folder), 64)
        pictures = [read_image(file) for file in sorted(Path(folder).glob("photograph-*"))]
        for case in ((4, 1), (4, 2)) if bench.toy else CASES:
            if bench.over(3):
                bench.missing(_case(*case), models.OURS)
                continue
            # Of a new engine nothing is kept.
            engine = Engine(model, processor_of(size), slots=64)
            try:
                _measure(bench, engine, pictures, *case)
            finally:
                engine.close()


def _case(chats: int, each: int) -> str:
    shared = "a picture each" if each == 1 else f"{each} questions on each picture"
    return f"{chats} chats at once, {shared}, {NEW} tokens"


def _measure(bench: Bench, engine: Engine, pictures: Sequence[Any], chats: int, each: int) -> None:
    waves, firsts = [], []
    for wave in range(2 if bench.rehearsal or bench.toy else 4):
        # Turned, so that no wave meets pictures that were read before.
        shown = [picture.rotate(90 * wave, expand=True) for picture in pictures[: -(-chats // each)]]
        took, first = _wave(engine, [shown[i // each] for i in range(chats)])
        if wave:  # the first compiles and captures
            waves.append(1e3 * took)
            firsts += first
    name, tokens = _case(chats, each), chats * NEW
    bench.add(name, models.OURS, "engine", Timing.of(waves), unit="tokens/s", work=tokens, batch=chats)
    bench.add(f"{name}: first token", models.OURS, "engine", value=1e3 * median(firsts), batch=chats)


def _wave(engine: Engine, pictures: Sequence[Any]) -> tuple[float, list[float]]:
    """Seconds until the last piece, and until the first one of each chat."""
    firsts: dict[int, float] = {}
    ends: list[Piece] = []
    done = threading.Event()

    def ask(number: int) -> None:
        def deliver(piece: Piece) -> None:
            if piece.tokens:
                firsts.setdefault(number, time.perf_counter())
            if piece.finish is not None:  # on the engine's thread alone
                ends.append(piece)
                if len(ends) == len(pictures):
                    done.set()

        content = [{"type": "image", "image": pictures[number]}, {"type": "text", "text": texts[number]}]
        engine.submit([{"role": "user", "content": content}], Sampling(max_new_tokens=NEW), deliver)

    texts = questions(len(pictures))
    with ThreadPoolExecutor(8) as threads:
        began = time.perf_counter()
        list(threads.map(ask, range(len(pictures))))
        if not done.wait(300):
            raise TimeoutError("no answer in five minutes")
    took = time.perf_counter() - began
    if short := [end for end in ends if end.tokens < NEW]:  # random weights do not stop by themselves
        raise RuntimeError(f"{len(short)} answers ended early: {short[0]}")
    return took, [first - began for first in firsts.values()]
