"""Draws docs/demo.png: a scene of the procedural world beside what the shipped model answers about it.

    python studies/demo_picture.py            # writes docs/scene.png and docs/demo.png

The scene's own questions are asked, all of them; a wrong answer is drawn in red with the right one behind it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import vlmamba
from vlmamba.data.scenes import World

SEED, INDEX = 2026, 39
DOCS = Path(__file__).parents[1] / "docs"
SCALE, WIDTH, LINE = 4, 1240, 58


@torch.inference_mode()
def main() -> None:
    scene = World(SEED, "test").sample(INDEX)
    scene.image.save(DOCS / "scene.png")
    model = vlmamba.VLMambaForConditionalGeneration.from_pretrained(vlmamba.nano(), dtype=torch.float32).eval()
    processor = vlmamba.VLMambaProcessor.from_pretrained(vlmamba.nano())

    side = scene.image.width * SCALE
    page = Image.new("RGB", (WIDTH, side + 48), "white")
    page.paste(scene.image.resize((side, side), Image.Resampling.NEAREST), (24, 24))
    draw = ImageDraw.Draw(page)
    font, bold = ImageFont.load_default(21), ImageFont.load_default(24)
    for row, question in enumerate(scene.questions):
        content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question.prompt()}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
        right = answer.lower() == question.answer.lower()
        y = 34 + row * LINE
        draw.text((side + 52, y), question.text, fill="#444444", font=font)
        shown = answer if right else f"{answer}   (it is: {question.answer})"
        draw.text((side + 76, y + 24), shown, fill="#0a6b3d" if right else "#b3261e", font=bold)
    page.save(DOCS / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
