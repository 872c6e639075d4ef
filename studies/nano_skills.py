"""What the nano model can do: accuracy per skill on fresh questions, beside what could be had without looking.

    python studies/nano_skills.py runs/nano/model --output docs/nano --questions 10000 [--blind runs/nano-blind/model]

Writes skills.json, skills.md and skills.svg. Columns: the model; the majority answer of each form of question; a blind
model (`--blind` names one trained without pictures, else the model itself goes without); the model on pictures whose
8 x 8 px patches are shuffled; the model on held-out combinations (pairs and words that are never shown in training);
and by how much the blind model is above the majority answer, question by question. These two cost little and are asked
three times as many questions, for what is to be shown of them is that they do not differ.

Letters: B questions of a batch, N questions in all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from vlmamba import VLMambaForCausalLM, VLMambaForConditionalGeneration, VLMambaProcessor
from vlmamba.commands.answerer import ModelAnswerer
from vlmamba.data.scenes import SKILLS, Question, World

SEED = 987_654_321
"""Of the questions: no recipe uses it."""
PATCH = 8
SHORT, LONGEST = 16, 60
"""Tokens of an answer at most, and of an open one: what goes on for longer is wrong anyway."""
COLUMNS = ("model", "majority", "blind", "shuffled", "held-out", "blind - majority")
Scores = list[tuple["Asked", float]]
Look = Callable[["Asked"], Image.Image] | None


@dataclass(frozen=True)
class Asked:
    """One question about one scene; `items` is how many things the scene holds."""

    scene: int
    items: int
    image: Image.Image
    question: Question


def ask(split: str, count: int, seed: int = SEED) -> list[Asked]:
    """The first `count` questions of a world."""
    world = World(seed, split)

    def every() -> Iterator[Asked]:
        index = 0
        while True:
            sample, items = world.sample(index), len(world.scene(index).items)
            for question in sample.questions:
                yield Asked(index, items, sample.image, question)
            index += 1

    return list(islice(every(), count))


# Answering -----------------------------------------------------------------------------------------------------------


def answer(
    answerer: ModelAnswerer, asked: Sequence[Asked], look: Look, batch: int, longest: int = LONGEST
) -> list[str]:
    """Greedy replies; `look` gives the picture that is shown, None shows none. Questions of a scene that stand together
    have its picture read once; open ones, whose answers are long, are asked apart."""
    replies = [""] * len(asked)
    parts: list[tuple[int, list[int]]] = []
    for is_open, most in ((False, min(SHORT, longest)), (True, longest)):
        chosen = [i for i, a in enumerate(asked) if (a.question.kind == "open") is is_open]
        parts += [(most, chosen[start : start + batch]) for start in range(0, len(chosen), batch)]
    for most, part in track(parts, f"{len(asked):,} questions", console=Console(stderr=True)):
        shown = {asked[i].scene: None if look is None else look(asked[i]) for i in part}
        chats = [_chat(asked[i].question.prompt(), shown[asked[i].scene]) for i in part]
        for i, reply in zip(part, answerer.converse(chats, most), strict=True):
            replies[i] = reply
    return replies


def scored(asked: Sequence[Asked], replies: Sequence[str]) -> Scores:
    """Every question with what its reply is worth."""
    return [(a, score(a.question, reply)) for a, reply in zip(asked, replies, strict=True)]


def _chat(text: str, image: Image.Image | None) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def shuffled(asked: Asked) -> Image.Image:
    """The picture with its patches in random places."""
    pixels = np.asarray(asked.image)
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    patches = pixels.reshape(rows, PATCH, columns, PATCH, 3).swapaxes(1, 2).reshape(-1, PATCH, PATCH, 3)
    patches = patches[np.random.default_rng(asked.scene).permutation(len(patches))]
    return Image.fromarray(patches.reshape(rows, columns, PATCH, PATCH, 3).swapaxes(1, 2).reshape(pixels.shape))


def majority(asked: Iterable[Asked], learned_from: Iterable[Asked]) -> list[bool]:
    """Whether the commonest answer of a question's form, counted on other questions, is right."""
    guesses: dict[str, Counter[str]] = defaultdict(Counter)
    for known in learned_from:
        guesses[known.question.form][known.question.guess] += 1
    return [
        bool(guesses[a.question.form]) and guesses[a.question.form].most_common(1)[0][0] == a.question.guess
        for a in asked
    ]


def without_looking(asked: Sequence[Asked], replies: Sequence[str], seed: int) -> dict[str, Scores]:
    """What a blind model's replies are worth, and the majority answer; of questions that have one, the difference."""
    blind = scored(asked, replies)
    guessed = majority(asked, ask("train", len(asked), seed + 1))
    known = [
        (a, float(right), said) for (a, said), right in zip(blind, guessed, strict=True) if a.question.kind != "open"
    ]
    return {
        "blind": blind,
        "majority": [(a, right) for a, right, _ in known],
        "blind - majority": [(a, said - right) for a, right, said in known],
    }


# Scoring -------------------------------------------------------------------------------------------------------------


def score(question: Question, reply: str) -> float:
    """1 or 0 for an exact answer (case and a final period aside); for open questions the F1 of the words."""
    reply = reply.strip().rstrip(".").lower()
    if question.kind != "open":
        return float(reply == question.answer.strip().lower())
    said, expected = Counter(reply.split()), Counter(question.answer.lower().rstrip(".").split())
    common = sum((said & expected).values())
    return 2 * common / (sum(said.values()) + sum(expected.values())) if common else 0.0


def summarise(scores: Scores) -> dict[str, float]:
    """Percent, standard error with questions of one scene taken together, and the number of questions."""
    values = np.array([value for _, value in scores])
    if not len(values):
        return {"accuracy": float("nan"), "error": float("nan"), "questions": 0}
    scenes = np.unique([a.scene for a, _ in scores], return_inverse=True)[1]
    residuals = np.bincount(scenes, weights=values - values.mean())
    return {
        "accuracy": 100 * float(values.mean()),
        "error": 100 * float(np.sqrt((residuals**2).sum()) / len(values)),
        "questions": len(values),
    }


def by_group(scores: Scores) -> dict[str, dict[str, float]]:
    """Per skill, and the finer ones that say how hard the world is."""
    groups: dict[str, Scores] = {skill: [s for s in scores if s[0].question.skill == skill] for skill in SKILLS}
    words = [s for s in groups["reading"] if s[0].question.form == "reading.word"]
    for low, high in ((2, 4), (5, 6), (7, 8)):
        groups[f"words of {low}-{high} letters"] = [s for s in words if low <= len(s[0].question.answer) <= high]
    groups["scenes of 1-4 items"] = [s for s in scores if s[0].items < 5]
    groups["scenes of 5+ items"] = [s for s in scores if s[0].items >= 5]
    groups["all"] = list(scores)
    return {name: summarise(group) for name, group in groups.items() if group}


# Reports -------------------------------------------------------------------------------------------------------------


def table(columns: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: a row per group, a column per condition."""
    names = list(columns)
    lines = ["| | questions | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for group, main in columns[names[0]].items():
        cells = [
            f"{c[group]['accuracy']:.1f} ± {c[group]['error']:.1f}" if group in c else "-" for c in columns.values()
        ]
        lines.append(f"| {group} | {main['questions']:,.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def bars(columns: dict[str, dict[str, dict[str, float]]]) -> str:
    """SVG: accuracy per skill, one bar per condition."""
    colours = ("#2a6fb0", "#9a9a9a", "#c9b458", "#c97b58", "#6aa36a")
    skills = [skill for skill in SKILLS if skill in next(iter(columns.values()))]
    height, left, step = 26 * len(skills) + 60, 120, 26
    parts = [f'<rect width="720" height="{height}" fill="white"/>']
    for i, name in enumerate(columns):
        parts.append(f'<rect x="{left + 118 * i}" y="8" width="10" height="10" fill="{colours[i % 5]}"/>')
        parts.append(f'<text x="{left + 118 * i + 14}" y="17">{name}</text>')
    for row, skill in enumerate(skills):
        top = 32 + row * step
        parts.append(f'<text x="{left - 8}" y="{top + 14}" text-anchor="end">{skill}</text>')
        thick = (step - 5) / len(columns)
        for i, column in enumerate(columns.values()):
            if skill in column:
                width, y = 5.6 * column[skill]["accuracy"], top + i * thick
                parts.append(
                    f'<rect x="{left}" y="{y:.1f}" width="{width:.1f}" height="{thick:.1f}" fill="{colours[i % 5]}"/>'
                )
    for tick in range(0, 101, 20):
        parts.append(f'<text x="{left + 5.6 * tick}" y="{height - 8}" text-anchor="middle">{tick}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" width="720" height="{height}" '
        f'font-family="sans-serif" font-size="11">{"".join(parts)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of a VL-Mamba")
    parser.add_argument("--output", type=Path, default=Path("runs/nano-skills"))
    parser.add_argument("--questions", type=int, default=10_000)
    parser.add_argument("--blind", help="folder of a language model trained on the same conversations, no pictures")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", default=None, help="float32 or bfloat16; default: float32")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype or "float32")
    processor = VLMambaProcessor.from_pretrained(args.model)

    def answerer_of(kind: Any, folder: str) -> ModelAnswerer:
        return ModelAnswerer(kind.from_pretrained(folder, dtype=dtype).to(device).eval(), processor)

    seeing = answerer_of(VLMambaForConditionalGeneration, args.model)
    blind = seeing if args.blind is None else answerer_of(VLMambaForCausalLM, args.blind)

    asked, held_out = (ask(split, args.questions, args.seed) for split in ("test", "held-out"))
    more = ask("test", 3 * args.questions, args.seed)
    started = time.perf_counter()
    replies = answer(seeing, asked, lambda a: a.image, args.batch)
    scores: dict[str, Scores] = {
        "model": scored(asked, replies),
        "shuffled": scored(asked, answer(seeing, asked, shuffled, args.batch)),
        "held-out": scored(held_out, answer(seeing, held_out, lambda a: a.image, args.batch)),
    }
    scores |= without_looking(more, answer(blind, more, None, args.batch), args.seed)

    columns = {name: by_group(scores[name]) for name in COLUMNS}
    wrong = [
        {
            "scene": a.scene,
            "question": a.question.text,
            "answer": a.question.answer,
            "reply": reply,
            "form": a.question.form,
        }
        for a, reply in zip(asked, replies, strict=True)
        if score(a.question, reply) < 1 and a.question.kind != "open"
    ]
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"model": args.model, "seed": args.seed, "seconds": time.perf_counter() - started, "columns": columns}
    (args.output / "skills.json").write_text(json.dumps(report | {"wrong": wrong[:300]}, indent=1))
    (args.output / "skills.md").write_text(table(columns))
    (args.output / "skills.svg").write_text(bars({name: columns[name] for name in COLUMNS[:-1]}))
    print(table(columns))


if __name__ == "__main__":
    main()
