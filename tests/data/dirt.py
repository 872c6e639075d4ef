"""A LLaVA file with every kind of dirt that the real ones hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image


def talk(*values: str) -> list[dict[str, str]]:
    """Turns of human and gpt, by turns."""
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


GOOD = {
    "plain": {"image": "coco/a.jpg", "conversations": talk("<image>\nWhat is this?", "A red square")},
    "last": {"image": "coco/a.jpg", "conversations": talk("What is this?\n<image>", "A red square")},
    "text": {"conversations": talk("Is this yes?", "yes")},
    "html": {"conversations": talk("Is this yes?", "yes", "What is <image>?", "A tag, like <image>")},
    "suffix": {"image": "ocr/book.jpg", "conversations": talk("<image>\nWhat is this?", "A book")},
    "content": {"image": "ocr/gif-inside.jpg", "conversations": talk("<image>\nWhat is this?", "A book")},
    "empty-answer": {"image": "coco/a.jpg", "conversations": talk("<image>\nWhat?", "", "Is it red?", "yes")},
    "gpt-first": {
        "image": "coco/a.jpg",
        "conversations": talk("", "Hello", "<image>\nWhat?", "A square")[1:],
    },
    "later": {"image": "coco/a.jpg", "conversations": talk("Hello", "Hi", "<image> What is this?", "A red square")},
    "two": {"image": ["coco/a.jpg", "coco/b.png"], "conversations": talk("<image>\n<image>\nWhat differs?", "All")},
}
BAD = {
    "missing": ({"image": "coco/nowhere.jpg", "conversations": talk("<image>\nWhat?", "A cat")}, "no such image"),
    "truncated": ({"image": "coco/cut.jpg", "conversations": talk("<image>\nWhat?", "A cat")}, "damaged or truncated"),
    "not-image": ({"image": "coco/page.jpg", "conversations": talk("<image>\nWhat?", "A cat")}, "not an image"),
    "zero-bytes": ({"image": "coco/zero.jpg", "conversations": talk("<image>\nWhat?", "A cat")}, "not an image"),
    "silent": ({"image": "coco/a.jpg", "conversations": talk("<image>\nWhat?", " ")}, "no human turn with an answer"),
    "no-turns": ({"conversations": []}, "no human turn with an answer"),
    "count": (
        {"image": "coco/a.jpg", "conversations": talk("<image><image> What?", "A cat")},
        "2 <image> in",
    ),
    "no-mark": ({"image": "coco/a.jpg", "conversations": talk("What?", "A cat")}, r"0 <image> .* but 1 image"),
    "shape": ({"conversations": {"from": "human"}}, "expected a list of turns"),
}


def write(folder: Path) -> None:
    """data.json, the ten good and nine bad samples above and one that is no object, and their images."""
    for part in ("coco", "ocr"):
        (folder / part).mkdir(parents=True)
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    picture.save(folder / "coco/a.jpg")
    picture.rotate(90).save(folder / "coco/b.png")
    picture.save(folder / "ocr/book.gif")
    (folder / "ocr/gif-inside.jpg").write_bytes((folder / "ocr/book.gif").read_bytes())
    whole = (folder / "coco/a.jpg").read_bytes()
    (folder / "coco/cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "coco/page.jpg").write_text("<html>404 Not Found</html>")
    (folder / "coco/zero.jpg").touch()
    (folder / "coco/surplus.jpg").write_bytes(whole)
    entries: list[Any] = [{"id": name, **entry} for name, entry in GOOD.items()]
    entries += [{"id": name, **entry} for name, (entry, _) in BAD.items()]
    (folder / "data.json").write_text(json.dumps([*entries, None]))
