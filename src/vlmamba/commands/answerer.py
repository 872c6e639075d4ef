"""A model that answers many questions at a time, and reads a picture once for all questions on it.

A prompt is read in two parts: up to the end of its last picture, once for all prompts that begin so and mostly without
padding, and the rest, after the states were copied to the questions. Padding changes no state, so an answer does not
depend on its company.

Shapes: B prompts, L tokens, I images, V vocabulary.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmamba.data.remembering import Remembering
from vlmamba.evaluation.runner import Request
from vlmamba.models.decode import generate_tokens
from vlmamba.models.state import MambaState

if TYPE_CHECKING:
    from vlmamba.models.processor import VLMambaProcessor
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

LOOK_EVERY = 4  # tokens between two looks at who has ended: most answers have two or three
IMAGE_MODE = "pad"
Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """Token ids in two parts; `begin` ends with the last picture (without one: with the first token)."""

    begin: tuple[int, ...]
    rest: tuple[int, ...]
    pictures: tuple[Hashable, ...]


class ModelAnswerer:
    """Answers in batches, with pictures padded to a square.

    Args:
        model, processor: in eval mode, on their device.
        facts: what `describe` gives.
        threads: that read and scale pictures while the device works.
    """

    def __init__(
        self,
        model: VLMambaForConditionalGeneration,
        processor: VLMambaProcessor,
        facts: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ):
        self.model, self.processor, self._facts = model, processor, dict(facts or {})
        self._threads = ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1), "pictures")
        self._pixels: dict[Hashable, Future[np.ndarray]] = {}
        self._tokenise = Remembering(processor.tokenizer)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def describe(self) -> Mapping[str, Any]:
        """What makes answers of this model comparable: name, weights, dtype, decoding."""
        return self._facts

    def read_ahead(self, requests: Sequence[Request]) -> None:
        """Starts to read the pictures of what will be asked next."""
        for request in requests:
            if request.image is not None:
                self._picture(request.image)

    def answer(self, requests: Sequence[Request]) -> list[str]:
        """One answer a request, in their order; greedy."""
        chats = [[{"role": "user", "content": _content(request)}] for request in requests]
        return self.converse(chats, max(request.max_new_tokens for request in requests))

    def converse(self, chats: Sequence[Messages], max_new_tokens: int, **options: Any) -> list[str]:
        """The assistant's next message in each conversation, up to the first of the strings `until` where one occurs;
        options as `tokens` takes them."""
        texts = self._decode(self.tokens(chats, max_new_tokens, **options))
        return [_cut(text, options.get("until", ()))[0].strip() for text in texts]

    @torch.inference_mode()
    def tokens(
        self,
        chats: Sequence[Messages],
        max_new_tokens: int,
        *,
        until: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]:
        """Token ids of the assistant's next message in each conversation, without its end.

        Args:
            until: a row whose text holds one of these may end there.
            temperature, seed: as `generate_tokens` takes them; 0 is greedy.
        """
        inputs = self._inputs([self._prompt(chat) for chat in chats])
        end = self.processor.tokenizer.eos_token_id
        rows: list[list[int]] = [[] for _ in chats]
        how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        for block in generate_tokens(self.model, **inputs, **how, stops=[end], every=LOOK_EVERY):
            for row, new in zip(rows, block.tolist()):
                row += new
            if until and all(end in row or _cut(self._decode([row])[0], until)[1] for row in rows):
                break
        return [row[: row.index(end)] if end in row else row for row in rows]

    @torch.inference_mode()
    def likelihoods(self, chats: Sequence[Messages], continuations: Sequence[str]) -> list[tuple[float, bool]]:
        """Log likelihood of each text as the assistant's next words, its end not included, and whether a greedy answer
        would begin so."""
        prompts = [self._prompt(chat) for chat in chats]
        targets = self.processor.tokenizer(
            [" " + text.strip() for text in continuations], add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        inputs = self._inputs([replace(p, rest=(*p.rest, *target[:-1])) for p, target in zip(prompts, targets)])
        state, longest = inputs.pop("state", None), max(map(len, targets))
        logits = self.model(**inputs, cache_params=state, logits_to_keep=longest).logits.float()
        found = []
        for row, target in zip(logits.log_softmax(-1), targets):
            wanted = torch.tensor(target, device=row.device)
            row = row[-len(target) :]
            found.append((float(row.gather(1, wanted[:, None]).sum()), bool((row.argmax(-1) == wanted).all())))
        return found

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _prompt(self, chat: Messages) -> Prompt:
        ids, images = self.processor.encode_messages(chat, self._tokenise, add_generation_prompt=True)
        cut = 1
        if images:
            cut = len(ids) - ids[::-1].index(self.processor.image_token_id)
        return Prompt(tuple(ids[:cut]), tuple(ids[cut:]), tuple(map(self._picture, images)))

    def _picture(self, image: Any) -> Hashable:
        """The name of a picture, whose pixels are now on their way."""
        name: Hashable = image
        if isinstance(image, Image.Image):
            name = (image.mode, image.size, hashlib.sha256(image.tobytes()).digest())
        if name not in self._pixels:
            self._pixels[name] = self._threads.submit(self.processor.image_pixels, image, IMAGE_MODE)
        return name

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What is left to read of the prompts, as `generate_tokens` takes it, after what several have in common."""
        distinct: dict[tuple[Hashable, ...], int] = {}
        slots = [distinct.setdefault((p.begin, p.pictures), len(distinct)) for p in prompts]
        firsts = [prompts[slots.index(slot)] for slot in range(len(distinct))]
        pixels = self._normalised([name for first in firsts for name in first.pictures])
        whole = [p.begin + p.rest for p in prompts]
        # One pass costs less than two, but with padding in it a tenth more: then the long part is read without.
        if len(distinct) == len(prompts) and len(set(map(len, whole))) == 1:
            return self._padded(whole) | pixels
        state = MambaState.empty(self.model.config.get_text_config().num_hidden_layers)
        self.model(**self._padded([p.begin for p in firsts]), **pixels, cache_params=state, logits_to_keep=1)
        if len(distinct) < len(prompts):
            state = state.gather(torch.tensor(slots, device=self.device))
        return self._padded([p.rest for p in prompts]) | {"state": state}

    def _normalised(self, names: Sequence[Hashable]) -> dict[str, Tensor]:
        """The pictures' pixels (I, 3, H, W), which are then forgotten; nothing where there are none."""
        if not names:
            return {}
        pixels = torch.from_numpy(np.stack([self._pixels[name].result() for name in names]))
        for name in set(names):
            del self._pixels[name]
        return {"pixel_values": self.processor.normalise(pixels.to(self.device))}

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Token ids (B, L), padded on the left, with their mask if anything is."""
        longest, pad = max(map(len, rows)), self.processor.tokenizer.pad_token_id
        missing = [longest - len(row) for row in rows]
        inputs = {"input_ids": torch.tensor([[pad] * count + list(row) for count, row in zip(missing, rows)])}
        if any(missing):
            inputs["attention_mask"] = (torch.arange(longest) >= torch.tensor(missing)[:, None]).long()
        return {name: value.to(self.device) for name, value in inputs.items()}


def _content(request: Request) -> list[dict[str, Any]]:
    text = {"type": "text", "text": request.text}
    return [text] if request.image is None else [{"type": "image", "image": request.image}, text]


def _cut(text: str, until: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of some strings, and whether one occurs."""
    places = [place for stop in until if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
