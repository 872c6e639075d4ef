"""A conversation whose past is a state of fixed size: each turn reads its own tokens only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from vlmamba.commands.load import Loaded
from vlmamba.inference import Sampling
from vlmamba.inference.sampling import draw
from vlmamba.inference.text import Writer

if TYPE_CHECKING:
    from vlmamba.models.state import MambaState


class Conversation:
    """Questions and streamed answers.

    Attributes:
        tokens_read: tokens that went through the model so far, images and answers included.
    """

    def __init__(self, loaded: Loaded, sampling: Sampling):
        self._model, self._processor, self._device = loaded.model, loaded.processor, loaded.device
        self._sampling, self._chance = sampling, Random(sampling.seed)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._state: MambaState | None = None
        self._unread: list[int] = []  # said by the model, not yet read by it: the last token, and the end of its answer
        self.tokens_read = 0

    def ask(self, question: str, images: Sequence[Any] = ()) -> Iterator[str]:
        """Reads the question and yields the answer in pieces, as it comes.

        The turn is read when iteration begins. An answer that is not iterated to its end counts as far as it came.

        Raises:
            ValueError: an image cannot be read. The conversation stands as before.
        """
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            begin=self._state is None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        unread = torch.tensor([self._unread], dtype=torch.long)
        input_ids = torch.cat([unread, inputs["input_ids"]], dim=1)
        pixels = inputs.get("pixel_values")
        self._unread = []
        yield from _text(self._processor.tokenizer, self._generate(input_ids, pixels))

    def _generate(self, input_ids: torch.Tensor, pixels: torch.Tensor | None) -> Iterator[int]:
        """Token ids of the answer, without its end."""
        end = self._processor.tokenizer.eos_token_id
        logits = self._read(input_ids, pixels)
        self._unread = [end]
        for count in range(1, self._sampling.max_new_tokens + 1):
            token = self._pick(logits)
            if token == end:
                return
            self._unread = [token, end]  # an answer that stops here is closed before the next question
            yield token
            if count < self._sampling.max_new_tokens:
                logits = self._read(torch.tensor([[token]]), None)
                self._unread = [end]

    @torch.inference_mode()
    def _read(self, input_ids: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
        """Logits (V,) after the last token; the state moves on."""
        output = self._model(
            input_ids=input_ids.to(self._device),
            pixel_values=None if pixels is None else pixels.to(self._device),
            cache_params=self._state,
            use_cache=True,
            logits_to_keep=1,
        )
        self._state = output.cache_params
        self.tokens_read += input_ids.shape[1]
        return output.logits[0, -1].float()

    def _pick(self, logits: torch.Tensor) -> int:
        return int(draw(logits[None], [self._sampling], [self._chance.random()]))


def _text(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    writer = Writer(tokenizer, ())
    yield from filter(None, map(writer.write, tokens))
    yield from filter(None, [writer.rest()])
