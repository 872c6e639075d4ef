"""The model that ships, and chats about pictures of the world."""

from __future__ import annotations

import pytest
import torch

from vlmamba.commands.load import Loaded, load
from vlmamba.data.scenes import World


@pytest.fixture(scope="session")
def nano() -> Loaded:
    return load("nano", "cpu", "float32")


@pytest.fixture(scope="session")
def chats() -> list[list[dict]]:
    """Eight questions on one picture, two on two others, one on two pictures together, one without any."""
    world = World(4321)
    samples = [world.sample(i) for i in range(3)]

    def chat(text: str, *images) -> list[dict]:
        return [
            {
                "role": "user",
                "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}],
            }
        ]

    many = [chat(q.prompt(), samples[0].image) for q in samples[0].questions]
    others = [chat(s.questions[0].prompt(), s.image) for s in samples[1:]]
    both = chat("What do the pictures have in common?", samples[0].image, samples[1].image)
    return [*many, *others, both, chat("what colour is the sky?")]


@pytest.fixture(scope="session")
def alone(nano: Loaded, chats: list[list[dict]]) -> list[str]:
    """What `generate` answers to each by itself, in at most 12 tokens."""
    answers = []
    for chat in chats:
        inputs = nano.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            ids = nano.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        answers.append(nano.processor.tokenizer.batch_decode(new, skip_special_tokens=True)[0].strip())
    return answers
