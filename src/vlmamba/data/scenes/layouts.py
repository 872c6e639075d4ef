"""The layouts of training files and benchmarks, filled with scenes: one function for each."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from vlmamba.data.scenes.question import Question
from vlmamba.data.scenes.sprites import available_things
from vlmamba.data.scenes.vocabulary import article
from vlmamba.data.scenes.world import KINDS, SceneSample, World

_TEXT_FREE = 0.06  # the part of stage 2 that has no picture, as in LLaVA's mixture


@dataclass(frozen=True)
class Source:
    """Where a set comes from: a world's seed, split and size of picture, how many pictures; `step` reports one done."""

    seed: int
    split: str
    size: int
    count: int
    rng: Random
    step: Callable[[], None]

    def world(self, kinds: Mapping[str, float] | None = None, questions: int = 8) -> World:
        return World(self.seed, self.split, self.size, kinds=kinds, questions=questions)

    def samples(self, kinds: Mapping[str, float] | None = None) -> Iterator[tuple[int, SceneSample]]:
        world = self.world(kinds)
        for index in range(self.count):
            yield index, world.sample(index)
            self.step()


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        image.save(path, quality=95, subsampling=0)
    else:
        image.save(path, compress_level=2)


def conversation(questions: list[Question], rng: Random, lead: str = "") -> list[dict[str, str]]:
    """Turns of a LLaVA record: `lead` (such as "<image>\\n") before the first question; the usual instructions after
    all short questions in three conversations of five, after none in the others."""
    instruct = rng.random() < 0.6
    turns = []
    for place, question in enumerate(questions):
        turns.append({"from": "human", "value": (lead if place == 0 else "") + question.prompt(instruct)})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def llava_stage1(folder: Path, source: Source) -> None:
    """`stage1.json` and images/: one caption or description a picture, `<image>` first or last."""
    records = []
    for index, sample in source.samples():
        name = f"{index:09d}.png"
        _save(sample.image, folder / "images" / name)
        ask = source.rng.choice(("Describe the picture.", "What is shown?", "Give a short account of the image."))
        human = f"<image>\n{ask}" if source.rng.random() < 0.5 else f"{ask}\n<image>"
        said = sample.caption if source.rng.random() < 0.5 else sample.description
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": said}]
        records.append({"id": f"{index:09d}", "image": f"images/{name}", "conversations": turns})
    _write_json(folder / "stage1.json", records)


def llava_stage2(folder: Path, source: Source) -> None:
    """`stage2.json` and scenes/images/: conversations of several turns; some over a description without a picture."""
    records = []
    for index, sample in source.samples():
        record: dict[str, object] = {"id": f"{index:09d}"}
        lead = "<image>\n"
        if source.rng.random() < _TEXT_FREE:
            lead = sample.description + "\n"
        else:
            record["image"] = f"scenes/images/{index:09d}.png"
            _save(sample.image, folder / str(record["image"]))
        record["conversations"] = conversation(sample.questions, source.rng, lead)
        records.append(record)
    _write_json(folder / "stage2.json", records)


def _ten(answer: str, rng: Random) -> list[str]:
    """Ten annotators, of whom up to three say something else in one question of four."""
    strays = rng.randint(1, 3) if rng.random() < 0.25 else 0
    return [answer] * (10 - strays) + ["unanswerable"] * strays


def _brief(sample: SceneSample) -> list[Question]:
    return [q for q in sample.questions if q.kind in ("short", "yesno")]


def vqav2(folder: Path, source: Source) -> None:
    """val2014 with annotations; and test-dev2015 within test2015, which have none."""
    asked: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for index, sample in source.samples():
        _save(sample.image, folder / f"val2014/COCO_val2014_{index:012d}.jpg")
        for place, question in enumerate(_brief(sample)):
            number = index * 1000 + place
            asked.append({"image_id": index, "question": question.text, "question_id": number})
            kind = "yes/no" if question.kind == "yesno" else "number" if question.answer.isdigit() else "other"
            answers = [
                {"answer": a, "answer_confidence": "yes", "answer_id": i + 1}
                for i, a in enumerate(_ten(question.answer, source.rng))
            ]
            annotations.append(
                {
                    "question_type": " ".join(question.text.lower().split()[:2]),
                    "multiple_choice_answer": question.answer,
                    "answers": answers,
                    "image_id": index,
                    "answer_type": kind,
                    "question_id": number,
                }
            )
    about = {"info": {"description": "scenes", "version": "1"}, "license": {"name": "MIT"}, "task_type": "Open-Ended"}
    val = {**about, "data_type": "mscoco", "data_subtype": "val2014"}
    _write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**val, "questions": asked})
    _write_json(folder / "v2_mscoco_val2014_annotations.json", {**val, "annotations": annotations})
    world = source.world()
    tests: list[dict[str, object]] = []
    for index in range(source.count, source.count + max(1, source.count // 5)):
        sample = world.sample(index)
        _save(sample.image, folder / f"test2015/COCO_test2015_{index:012d}.jpg")
        tests += [
            {"image_id": index, "question": q.text, "question_id": index * 1000 + i}
            for i, q in enumerate(_brief(sample))
        ]
    for subset, questions in (("test2015", tests), ("test-dev2015", tests[: max(1, len(tests) // 2)])):
        content = {**about, "data_type": "mscoco", "data_subtype": subset, "questions": questions}
        _write_json(folder / f"v2_OpenEnded_mscoco_{subset}_questions.json", content)


# How a skill stands in GQA: semantic type, and the operations that answer it.
_GQA: dict[str, tuple[str, tuple[str, ...]]] = {
    "naming": ("obj", ("select", "query: name")),
    "attributes": ("attr", ("select", "query: attribute")),
    "existence": ("obj", ("select", "exist")),
    "counting": ("global", ("select", "query: number")),
    "comparison": ("attr", ("select", "select", "compare")),
    "relations": ("rel", ("select", "relate", "query: name")),
    "two-step": ("rel", ("select", "relate", "relate", "query: name")),
    "reading": ("attr", ("select", "query: text")),
    "odd-one-out": ("obj", ("select", "different", "query: attribute")),
}
_SAME = (("is there ", " in the picture?"), ("can you see ", "?"), ("does the picture show ", "?"))


def _reworded(text: str) -> str:
    """An existence question in other words."""
    plain = text[0].lower() + text[1:]
    for place, (head, tail) in enumerate(_SAME):
        if plain.startswith(head) and plain.endswith(tail):
            head2, tail2 = _SAME[(place + 1) % len(_SAME)]
            return head2 + plain[len(head) : -len(tail)] + tail2
    return ""


def gqa(folder: Path, source: Source) -> None:
    """`testdev_balanced_questions.json` and images/; a question in other words entails the first, and is entailed."""
    table: dict[str, dict[str, object]] = {}
    kinds = {k: w for k, w in KINDS.items() if k not in ("table", "chart", "text")}
    for index, sample in source.samples(kinds):
        image = f"n{index:06d}"
        _save(sample.image, folder / f"images/{image}.jpg")
        for place, question in enumerate(q for q in _brief(sample) if q.skill in _GQA):
            number = f"{index:06d}{place:02d}"
            table[number] = _gqa_entry(question, image)
            if question.skill == "existence" and (other := _reworded(question.text)):
                twin = f"{index:06d}{place + 50:02d}"
                table[twin] = {**table[number], "question": other, "entailed": [number]}
                table[number]["entailed"] = [twin]
    _write_json(folder / "testdev_balanced_questions.json", table)


def _gqa_entry(question: Question, image: str) -> dict[str, object]:
    semantic, steps = _GQA[question.skill]
    structural = "verify" if question.kind == "yesno" else "choose" if question.choices else "query"
    if question.skill == "comparison":
        structural = "compare"
    operations = [
        {"operation": step, "argument": question.form.split(".")[-1], "dependencies": [i - 1] if i else []}
        for i, step in enumerate(steps)
    ]
    return {
        "semantic": operations,
        "entailed": [],
        "equivalent": [],
        "question": question.text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": None if structural in ("verify", "choose") else question.form, "local": question.form},
        "answer": question.answer,
        "semanticStr": "->".join(steps),
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": question.form, "semantic": semantic, "structural": structural},
        "fullAnswer": question.answer,
    }


def _lettered(source: Source) -> Iterator[tuple[int, SceneSample, Question, list[str]]]:
    """As many pictures as asked for that have a question with two to four lettered options; with that and these."""
    kinds = {k: KINDS[k] for k in ("rows", "free", "crowd", "text", "chart")}
    world, index = source.world(kinds, questions=24), 0
    for number in range(source.count):
        while True:
            sample = world.sample(index)
            index += 1
            fitting = [q for q in sample.questions if q.kind == "choice" and q.choices and len(q.choices) <= 4]
            if fitting:
                break
        question = source.rng.choice(fitting)
        yield number, sample, question, list(question.choices or ())
        source.step()


def scienceqa(folder: Path, source: Source) -> None:
    """`problems.json`, `pid_splits.json`, images/test/<id>/image.png; every second problem has no picture but its
    scene in the hint."""
    problems: dict[str, dict[str, object]] = {}
    for index, sample, question, options in _lettered(source):
        number, seen = str(index + 1), index % 2 == 0
        if seen:
            _save(sample.image, folder / f"images/test/{number}/image.png")
        problems[number] = {
            "question": question.text,
            "choices": options,
            "answer": "ABCDE".index(question.answer),
            "hint": "" if seen else sample.description,
            "image": "image.png" if seen else None,
            "task": "closed choice",
            "grade": f"grade{1 + index % 12}",
            "subject": ("natural science", "language science", "social science")[index % 3],
            "topic": question.form.split(".")[1],
            "category": question.form,
            "skill": question.skill,
            "lecture": "",
            "solution": sample.description,
            "split": "test",
        }
    _write_json(folder / "problems.json", problems)
    empty: list[str] = []
    splits = dict.fromkeys(("train", "val", "trainval", "minival", "minitest"), empty)
    _write_json(folder / "pid_splits.json", {**splits, "test": list(problems)})


def textvqa(folder: Path, source: Source) -> None:
    """`TextVQA_0.5.1_val.json`, the OCR tokens beside it, and train_images/."""
    data: list[dict[str, object]] = []
    tokens: list[dict[str, object]] = []
    world = source.world({"text": 0.7, "table": 0.15, "rows": 0.15})
    for index in range(source.count):
        sample = world.sample(index)
        image = f"{index:016x}"
        _save(sample.image, folder / f"train_images/{image}.jpg")
        written = sample.written
        tokens.append({"image_id": image, "ocr_tokens": written, "ocr_info": [{"word": w} for w in written]})
        reading = [q for q in _brief(sample) if q.skill in ("reading", "numbers", "arithmetic", "lookup")]
        for question in reading:
            data.append(
                {
                    "question": question.text,
                    "image_id": image,
                    "image_classes": [],
                    "flickr_original_url": "",
                    "flickr_300k_url": "",
                    "image_width": source.size,
                    "image_height": source.size,
                    "answers": _ten(question.answer, source.rng),
                    "question_tokens": question.text.lower().rstrip("?.").split(),
                    "question_id": len(data) + 34602,
                    "set_name": "val",
                }
            )
        source.step()
    about = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    _write_json(folder / "TextVQA_0.5.1_val.json", {**about, "data": data})
    _write_json(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {**about, "data": tokens})


def pope(folder: Path, source: Source) -> None:
    """Three files of JSON lines and val2014/: up to three present and as many absent things a picture, the absent ones
    at random, the commonest of the set, or those that most often stand with what is there. Raises ValueError without
    the emoji font: there are no things to ask about."""
    if not available_things():
        raise ValueError("a POPE set asks about things, which need the emoji font: see the warning above")
    world = source.world({"rows": 1.0})
    present: list[list[str]] = []
    for index in range(source.count):
        _save(world.sample(index).image, folder / f"val2014/COCO_val2014_{index:012d}.jpg")
        present.append(list(dict.fromkeys(i.name for i in world.scene(index).things)))
        source.step()
    common = Counter(name for names in present for name in names)
    together: Counter[tuple[str, str]] = Counter((a, b) for names in present for a in names for b in names if a != b)
    for way in ("random", "popular", "adversarial"):
        lines: list[str] = []
        for index, names in enumerate(present):
            others = source.rng.sample([t for t in available_things() if t not in names], 60)
            if way == "popular":
                others.sort(key=lambda t: -common[t])
            elif way == "adversarial":
                others.sort(key=lambda t, names=names: -sum(together[t, n] for n in names))  # type: ignore[misc]
            for yes, no in zip(names[:3], others):
                for name, label in ((yes, "yes"), (no, "no")):
                    text = f"Is there {article(name)} in the image?"
                    image = f"COCO_val2014_{index:012d}.jpg"
                    line = {"question_id": len(lines) + 1, "image": image, "text": text, "label": label}
                    lines.append(json.dumps(line))
        (folder / f"coco_pope_{way}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


# MME's tasks: kinds of picture, and forms or skills of question that stand in for it.
_MME: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "existence": (("rows", "free"), ("existence",)),
    "count": (("crowd",), ("counting",)),
    "position": (("rows", "free"), ("relations.which", "relations.place")),
    "color": (("rows", "free"), ("attributes.colour",)),
    "posters": (("text",), ("attributes.ink", "reading.word")),
    "celebrity": (("rows",), ("naming",)),
    "scene": (("odd",), ("odd-one-out",)),
    "landmark": (("rows",), ("relations",)),
    "artwork": (("rows", "free"), ("attributes.pattern", "attributes.shape")),
    "OCR": (("text",), ("reading", "numbers.read")),
    "commonsense_reasoning": (("rows",), ("two-step",)),
    "numerical_calculation": (("text",), ("arithmetic",)),
    "text_translation": (("table",), ("lookup",)),
    "code_reasoning": (("chart",), ("charts",)),
}
_APART = ("artwork", "celebrity", "landmark", "posters", "scene")
_PLEASE = " Please answer yes or no."


def mme(folder: Path, source: Source) -> None:
    """Fourteen task folders; each picture has one question that is true and one that is not."""
    for place, (task, (kinds, wanted)) in enumerate(_MME.items()):
        world = World(source.seed + place, source.split, source.size, kinds=dict.fromkeys(kinds, 1.0), questions=16)
        images, notes = (folder / task / "images", folder / task / "questions_answers_YN") if task in _APART else (
            folder / task, folder / task)  # fmt: skip
        notes.mkdir(parents=True, exist_ok=True)
        known: dict[str, list[str]] = {}
        made, index = 0, 0
        share = max(1, source.count // len(_MME))
        while made < share and index < 50 * share + 200:
            sample = world.sample(index)
            pair = _true_and_false(sample, wanted, known, source.rng)
            index += 1
            if pair is None:
                continue
            _save(sample.image, images / f"{made:04d}.png")
            lines = [f"{text}{_PLEASE}\t{answer}" for text, answer in pair]
            (notes / f"{made:04d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            made += 1
            source.step()


def _true_and_false(
    sample: SceneSample, wanted: tuple[str, ...], known: dict[str, list[str]], rng: Random
) -> list[tuple[str, str]] | None:
    """A true and a false question on one picture, from a yes and a no there, or from an answer and another's."""
    fitting = [q for q in _brief(sample) if q.skill in wanted or q.form in wanted]
    sides = {q.answer: q for q in fitting if q.kind == "yesno"}
    if len(sides) == 2:
        pair = [(sides[a].text.removesuffix(" please answer yes or no."), a.capitalize()) for a in ("yes", "no")]
        return rng.sample(pair, 2)
    for question in fitting:
        if question.kind != "short":
            continue
        seen = known.setdefault(question.form, [])
        pool = list(question.choices or seen)
        seen.append(question.answer)
        wrong = [a for a in pool if a != question.answer]
        if wrong:
            other = rng.choice(wrong)
            pair = [(f"{question.text} is it {question.answer}?", "Yes"), (f"{question.text} is it {other}?", "No")]
            return rng.sample(pair, 2)
    return None


_MMBENCH_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment",
    "split",
)  # fmt: skip


def mmbench(folder: Path, source: Source) -> None:
    """`mmbench_dev_20230712.tsv`: every question once for each turn of its options, indices a million apart."""
    with (folder / "mmbench_dev_20230712.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _MMBENCH_COLUMNS, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for index, sample, question, options in _lettered(source):
            raw = io.BytesIO()
            sample.image.save(raw, "PNG")
            right = options["ABCD".index(question.answer)]
            for turn in range(len(options)):
                row = dict(zip("ABCD", options))
                row |= {
                    "index": str(index + turn * 1_000_000),
                    "question": question.text,
                    "hint": "",
                    "answer": "ABCD"[options.index(right)],
                    "category": question.form.rsplit("-", 1)[0].replace(".", "_"),
                    "image": base64.b64encode(raw.getvalue()).decode("ascii"),
                    "source": "scenes",
                    "l2-category": question.skill,
                    "comment": "",
                    "split": "dev",
                }
                writer.writerow(row)
                options = options[1:] + options[:1]


_CAPABILITY = {
    "naming": ["rec"], "attributes": ["rec"], "counting": ["rec"], "relations": ["rec", "spat"],
    "two-step": ["rec", "spat"], "reading": ["ocr"], "numbers": ["ocr"], "arithmetic": ["ocr", "math"],
    "lookup": ["ocr", "spat"], "charts": ["ocr", "math"], "open": ["rec", "gen"], "odd-one-out": ["rec", "know"],
}  # fmt: skip


def mm_vet(folder: Path, source: Source) -> None:
    """`mm-vet.json` and images/: one question a picture with a reference answer, its facts joined by <AND>."""
    table: dict[str, dict[str, object]] = {}
    for index, sample in source.samples():
        fitting = [q for q in sample.questions if q.skill in _CAPABILITY and q.kind in ("short", "open")]
        question = source.rng.choice(fitting or sample.questions)
        name = f"v1_{index}.png"
        _save(sample.image, folder / "images" / name)
        answer = question.answer
        if question.form == "open.list":
            answer = "<AND>".join(part for piece in answer.split(", ") for part in piece.split(" and "))
        table[f"v1_{index}"] = {
            "imagename": name,
            "question": question.text,
            "answer": answer,
            "capability": _CAPABILITY.get(question.skill, ["rec"]),
            "imagesource": "scenes",
        }
    _write_json(folder / "mm-vet.json", table)
