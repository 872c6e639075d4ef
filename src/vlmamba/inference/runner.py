"""The model over a pool of states: reads stretches of prompts, and one more token for all that are answering.

On a GPU the one-token step is captured, once for each size of batch, and works on the slots where they lie; elsewhere,
or where the fused weights cannot stand for the model, the states are taken out of the pool and put back.

Shapes: B rows, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlmamba.inference.pool import States
from vlmamba.inference.request import Picture, Sampling
from vlmamba.inference.sampling import draw, to_device
from vlmamba.models.decode import BUCKETS, Decoder, Step, copy_all, decoder_of, look_again, rows_for
from vlmamba.models.state import MambaState

if TYPE_CHECKING:
    from vlmamba.models.processor import VLMambaProcessor
    from vlmamba.models.vlm import VLMambaForConditionalGeneration


class Runner:
    """All that touches the device.

    Args:
        model, processor: in eval mode, on their device.
        slots: sequences in the pool. decoder: fused weights; of the model if not given.
        options: of every captured step, for tests.

    Raises:
        ValueError: there is no memory for so many slots.
    """

    def __init__(
        self,
        model: VLMambaForConditionalGeneration,
        processor: VLMambaProcessor,
        slots: int,
        decoder: Decoder | None = None,
        **options: Any,
    ) -> None:
        self.model, self.processor = model, processor
        language, config = model.language_model, model.config.text_config
        look_again(language)
        found = decoder or decoder_of(language)
        self._decoder = found if isinstance(found, Decoder) else None
        self._options = options
        self._steps: dict[int, Step] = {}
        weight = model.get_input_embeddings().weight
        self.device, self._vocabulary = weight.device, model.config.num_text_tokens or len(weight)
        self.ahead = self.device.type == "cuda"
        """Whether the device works on while its results are looked at."""
        # A slot more than asked for: of the rows of a captured step that no sequence needs.
        shape = (config.intermediate_size, config.state_size, config.conv_kernel)
        try:
            with torch.inference_mode(False):
                self.pool = States.zeros(
                    config.num_hidden_layers, slots + 1, *shape, dtype=weight.dtype, device=weight.device
                )
                self._last = torch.zeros(slots + 1, dtype=torch.int64, device=weight.device)  # drawn in each slot
        except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is one
            each = States.zeros(config.num_hidden_layers, 1, *shape, dtype=weight.dtype, device="meta").nbytes
            raise ValueError(
                f"{slots} slots of {each / 1e6:.1f} MB do not fit beside the model on {weight.device}; take fewer"
            ) from error
        self.state_bytes = self.pool.nbytes // (slots + 1)
        self._by_layer = self.pool.by_layer()
        if self._decoder is not None and self.ahead:  # captured before anybody waits
            for batch in filter(rows_for(slots).__ge__, BUCKETS):
                self._step(batch)

    def on_device(self) -> AbstractContextManager[object]:
        """Within it, the device is the thread's own: events and streams are those of the GPU where the model is."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def put(self, slot: int, state: States | None) -> None:
        """Makes a slot's state this one; None: nothing was read."""
        if state is None:
            self.pool.clear(slot)
        else:
            self.pool.scatter(self._there([slot]), state)

    def take(self, slot: int) -> States:
        """A copy of a slot's state."""
        return self.pool.gather(self._there([slot]))

    @torch.inference_mode()
    def read(self, rows: Sequence[Sequence[int]], slots: Sequence[int], pictures: Sequence[Picture]) -> Tensor:
        """Reads more tokens of some sequences; logits (B, V) float32 after the last ones. pictures: all, row by row."""
        longest, pad = max(map(len, rows)), self.processor.tokenizer.pad_token_id
        missing = [longest - len(row) for row in rows]
        ids = torch.tensor([[pad] * count + list(row) for count, row in zip(missing, rows, strict=True)])
        inputs: dict[str, Tensor] = {}
        if any(missing):
            inputs["attention_mask"] = (torch.arange(longest) >= torch.tensor(missing)[:, None]).long().to(self.device)
        if pictures:
            pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).to(self.device)
            inputs["pixel_values"] = self.processor.normalise(pixels)
        return self._through_modules(ids, slots, **inputs)

    @torch.inference_mode()
    def step(self, slots: Sequence[int]) -> Tensor:
        """Reads the token last drawn in each slot; logits (B, V) float32, valid until the next call."""
        if self._decoder is None:
            return self._through_modules(self._last[self._there(slots)][:, None], slots)
        step = self._step(len(slots))
        buffers, spare = step.buffers, [step.spare] * (len(step.buffers.slots) - len(slots))
        where = self._there([*slots, *spare])
        buffers.slots.copy_(where)
        buffers.tokens.copy_(self._last[where])
        buffers.count.zero_()  # of the step's own sampling, which is not used
        step.run()
        logits = self._of_words(buffers.logits[: len(slots)])
        if self.model.config.image_token_id < logits.shape[1]:
            logits[:, self.model.config.image_token_id] = -torch.inf  # a placeholder is never an answer
        return logits

    @torch.inference_mode()
    def draw(
        self, logits_BV: Tensor, slots: Sequence[int], how: Sequence[Sampling], chances: Sequence[float]
    ) -> Callable[[], list[int]]:
        """The next token of each slot. The device is not waited for: that does the function which tells the tokens."""
        tokens = draw(logits_BV, how, chances)
        self._last[self._there(slots)] = tokens
        if tokens.device.type != "cuda":
            return tokens.tolist
        there = torch.empty(len(slots), dtype=torch.int64, pin_memory=True).copy_(tokens, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def tell() -> list[int]:
            copied.synchronize()
            return there.tolist()

        return tell

    def _there(self, numbers: Sequence[int]) -> Tensor:
        return to_device(numbers, self.device, torch.int64)

    def _step(self, batch: int) -> Step:
        rows = rows_for(batch)
        if rows not in self._steps:
            assert self._decoder is not None
            self._steps[rows] = Step(self._decoder.layers, self._decoder.head, self._by_layer, rows, **self._options)
        return self._steps[rows]

    def _through_modules(self, ids_BL: Tensor, slots: Sequence[int], **inputs: Any) -> Tensor:
        where = self._there(slots)
        states = self.pool.gather(where)
        before = states.by_layer()
        state = MambaState(before.conv, before.ssm)
        output = self.model(
            input_ids=ids_BL.to(self.device), cache_params=state, use_cache=True, logits_to_keep=1, **inputs
        )
        if state.conv[0] is not before.conv[0]:  # a single token takes it to where the model decodes
            copy_all(before.conv, state.conv)
            copy_all(before.ssm, state.ssm)
        self.pool.scatter(where, states)
        return self._of_words(output.logits[:, -1])

    def _of_words(self, logits_BV: Tensor) -> Tensor:
        """Without the vocabulary's padding."""
        return logits_BV[:, : self._vocabulary].float()
