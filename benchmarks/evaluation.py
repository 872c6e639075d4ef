"""Answering a benchmark: questions a second through `vlmamba.evaluation`, files read, answers on disk and scored.

Photographs of 640 x 480 (JPEG, every eighth a PNG), prompts as LLaVA's, four new tokens an answer (random weights never
stop by themselves). "distinct": a picture each, held against the matrix work of tower, connector, prompt and answer, of
every question, padding not credited. "six": six questions on each picture, which is read once; no share is given.

Letters: P visual tokens, d width.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks import models
from benchmarks.bench import Bench
from benchmarks.timing import Timing
from vlmamba.commands.answerer import ModelAnswerer
from vlmamba.evaluation import OwnData, evaluate
from vlmamba.evaluation.task import SHORT_ANSWER
from vlmamba.models.preparation import build_image_processor
from vlmamba.models.processor import VLMambaProcessor
from vlmamba.models.template import SYSTEM

NEW = 4
# Batch size, questions on each picture, batches. A part's first case is what its others are compared with.
PARTS = {"marks": ((64, 1, 8), (64, 6, 16)), "more": ((128, 1, 4), (192, 6, 8))}
WORDS = (
    *("what", "is", "the", "colour", "of", "shape", "thing", "left", "right", "above", "below", "next", "to", "front"),
    *("how", "many", "people", "are", "there", "on", "street", "table", "does", "it", "wear", "a", "hat", "hold"),
    *("cup", "bus", "sign", "say", "which", "animal", "largest", "smallest", "room", "sky", "weather", "photo"),
)


def run(bench: Bench) -> None:
    size = "toy" if bench.toy else "2.8b"
    with bench.row_of(f"evaluation {size}", models.OURS, "all"), tempfile.TemporaryDirectory() as folder:
        model = models.our_vlm(size, bench.device, torch.float32 if bench.toy else torch.bfloat16)
        answerer = ModelAnswerer(model, processor_of(size), {"model": size, "weights": "random", "decoding": "greedy"})
        cases = PARTS[bench.part]
        if bench.toy:
            cases = tuple((12, each, 2) for _, each, _ in cases)
        photographs(Path(folder), max(-(-batch * count // each) for batch, each, count in cases))
        distinct = 0.0
        for batch, each, count in cases:
            kind = "distinct pictures" if each == 1 else f"{each} questions on each picture"
            if bench.over(5):
                bench.missing(f"short answers, {kind}", models.OURS)
                continue
            speed = _one(bench, answerer, Path(folder), kind, (batch, each, batch * count))
            distinct = distinct or speed
            if each > 1:
                case = f"{each} questions on each picture against distinct pictures"
                bench.add(case, models.OURS, f"batch {batch}", unit="x", value=speed / distinct, batch=batch)


def _one(bench: Bench, answerer: ModelAnswerer, folder: Path, kind: str, case: tuple[int, int, int]) -> float:
    """Questions a second of one case (batch size, questions on each picture, questions), all of the runner counted."""
    batch, each, count = case
    texts = questions(count)
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}] for text in texts]
    files = sorted(folder.glob("photograph-*"))
    records = [{"id": str(i), "image": files[i // each].name, "conversations": turn} for i, turn in enumerate(turns)]
    asked = folder / f"questions-{batch}-{each}.json"
    asked.write_text(json.dumps(records))
    task = OwnData("exact", folder, max_new_tokens=NEW)

    def seconds(limit: int | None) -> float:
        with tempfile.TemporaryDirectory() as out:
            bench.wait()
            before = time.perf_counter()
            evaluate(answerer, [task], asked, Path(out), batch_size=batch, limit=limit)
            bench.wait()
            return time.perf_counter() - before

    seconds(2 * batch)  # kernels are compiled, graphs captured
    samples = [seconds(None)]
    while len(samples) < 3 and not bench.rehearsal and not bench.over(2 * samples[0] + 5):
        samples.append(seconds(None))
    row = bench.add(
        f"short answers, {kind}",
        models.OURS,
        f"batch {batch}",
        Timing.of([1e3 * sample for sample in samples]),
        unit="questions/s",
        work=count,
        floor_flops=matrix_work(answerer, texts) if each == 1 else None,
        batch=batch,
    )
    assert row.value is not None
    return row.value


def matrix_work(answerer: ModelAnswerer, texts: Iterable[str]) -> float:
    """FLOP of the products for one question of each text, on a picture of its own."""
    model, processor = answerer.model, answerer.processor
    config, patches = model.config.vision_config, processor.num_image_tokens
    tower, connector = models.count_parameters(model.vision_tower), models.count_parameters(model.connector)
    layers = len(model.vision_tower.model.encoder.layers)
    attention = 4.0 * layers * patches**2 * config.hidden_size
    head = model.language_model.lm_head.weight.numel()  # tied, so counted once; used for each new token alone
    body = models.count_parameters(model.language_model) - head
    picture = 2.0 * patches * (tower + connector) + attention
    total = 0.0
    for text in texts:
        content = [{"type": "image", "image": ""}, {"type": "text", "text": text}]
        ids, _ = processor.encode_messages([{"role": "user", "content": content}], add_generation_prompt=True)
        total += picture + 2.0 * body * (len(ids) + NEW - 1) + 2.0 * head * NEW
    return total


def questions(count: int) -> list[str]:
    """Questions of six to fourteen words, with LLaVA's ending."""
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(6, 14))) + "?" + SHORT_ANSWER for _ in range(count)]


def photographs(folder: Path, count: int) -> None:
    """Files of pictures with large shapes and grain, about as hard to decode as photographs."""
    draw = np.random.default_rng(0)
    grain = 12 * draw.standard_normal((480 + 64, 640 + 64, 3), np.float32)
    coarse = draw.integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    shifts = draw.integers(0, 64, (count, 2))

    def save(i: int) -> None:
        smooth = np.asarray(Image.fromarray(coarse[i]).resize((640, 480), Image.Resampling.BICUBIC), np.float32)
        top, left = shifts[i]
        pixels = (smooth + grain[top : top + 480, left : left + 640]).clip(0, 255).astype(np.uint8)
        ending = "png" if i % 8 == 7 else "jpg"
        Image.fromarray(pixels).save(folder / f"photograph-{i:05}.{ending}", quality=90, compress_level=1)

    with ThreadPoolExecutor() as threads:
        list(threads.map(save, range(count)))


def processor_of(size: str) -> VLMambaProcessor:
    """With a token for each word and mark of the prompts, about what GPT-NeoX's tokenizer needs for them."""
    texts = [SYSTEM, "USER ASSISTANT :?", SHORT_ANSWER, *WORDS]
    splitter = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    names = ["<|endoftext|>", "<image>", "<|padding|>", "<|unknown|>", *words]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, "<|unknown|>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.add_special_tokens(names[:4])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=names[0])
    config = models.vision_config(size)
    processor = VLMambaProcessor(build_image_processor(config), wrapped, patch_size=config.patch_size)
    assert processor.image_token_id == models.IMAGE_TOKEN
    return processor
