"""VL-Mamba in lmms-eval 0.7: `lmms-eval --model vlmamba --model_args pretrained=FOLDER --tasks mme --batch_size 64`.

lmms-eval finds `manifest` by the entry-point group `lmms_eval.models`. The chat interface: a request names a document,
and a function that makes messages of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from vlmamba.commands.answerer import Messages, ModelAnswerer
from vlmamba.commands.load import load

T = TypeVar("T")


def manifest() -> Any:
    """What lmms-eval's registry wants to know of the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vlmamba", chat_class_path=f"{__name__}.{VLMamba.__name__}")


class VLMamba(lmms):
    """Answers lmms-eval's requests in batches; a picture that several requests of a batch share is read once.

    Args:
        pretrained: `nano`, a folder, or a Hub id. device, dtype: as the command line takes them; under torchrun or
            accelerate each process takes the GPU of its local rank.
        batch_size: requests at a time ("auto": 64). max_batch_size: what lmms-eval passes along; unused.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "nano",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self._rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self._world_size > 1 and device in (None, "auto", "cuda") and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        loaded = load(pretrained, device or "auto", dtype)
        self._answerer: ModelAnswerer | None = ModelAnswerer(loaded.model, loaded.processor)
        self._device = loaded.device
        self.batch_size = 64 if batch_size in (None, "auto") else int(batch_size)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def answerer(self) -> ModelAnswerer:
        if self._answerer is None:
            raise ValueError("the model was cleaned out of memory; make a new one to ask further questions")
        return self._answerer

    def clean(self) -> None:
        """Frees the device's memory, for a judge that runs on it."""
        self._answerer = None
        super().clean()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each request. Greedy unless the task asks for `do_sample` or a temperature above 0.

        Raises:
            ValueError: beams, `top_p` below 1, or a message with video or sound: this model has none of them.
        """
        answers = [""] * len(requests)
        for number, (indices, chats) in enumerate(self._chats(requests, self._messages, _options_of)):
            options = requests[indices[0]].args[2]
            texts = self.answerer.converse(chats, **_style(options), seed=number)
            for index, text in zip(indices, texts):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", (requests[index].args[0], options), text)
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds of each request, one request after another: a round depends on the one before."""
        return [self._rounds(request) for request in requests]

    def _rounds(self, request: Instance) -> list[str]:
        _, make_messages, options, *place = request.args
        document, said, info = self._document(*place), [], None
        messages = make_messages(document)
        while messages is not None:
            said += self.answerer.converse([messages], **_style(options))
            following = make_messages(
                document, round_idx=len(said), previous_output=list(said), previous_round_info=info
            )
            is_round = isinstance(following, tuple) and len(following) == 4
            messages, terminal, _, info = following if is_round else (None, True, None, None)
            messages = None if terminal else messages
        return said

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation, and whether it is the greedy one."""
        found = [(0.0, False)] * len(requests)
        for indices, pairs in self._chats(requests, self._continuation, lambda request: None):
            chats, texts = zip(*pairs)
            for index, result in zip(indices, self.answerer.likelihoods(chats, texts)):
                found[index] = result
                self.cache_hook.add_partial("loglikelihood", requests[index].args[:2], result)
        return found

    def _chats(
        self, requests: Sequence[Instance], read: Callable[[Instance], T], kind: Callable[[Instance], Any]
    ) -> Iterator[tuple[list[int], list[T]]]:
        """Batches of requests of one kind: their indices and what `read` makes of them, the next batch meanwhile."""
        kinds: dict[Any, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(kind(request), []).append(index)
        size = self.batch_size
        batches = [same[i : i + size] for same in kinds.values() for i in range(0, len(same), size)]

        def read_all(batch: list[int]) -> list[T]:
            return [read(requests[index]) for index in batch]

        with ThreadPoolExecutor(1) as ahead:
            waiting = ahead.submit(read_all, batches[0]) if batches else None
            for batch, following in zip(batches, [*batches[1:], None]):
                assert waiting is not None
                ready = waiting.result()
                waiting = None if following is None else ahead.submit(read_all, following)
                yield batch, ready

    def _document(self, doc_id: Any, task: str, split: str) -> Any:
        return self.task_dict[task][split][doc_id]

    def _messages(self, request: Instance) -> Messages:
        _, make_messages, _, *place = request.args
        return make_messages(self._document(*place))

    def _continuation(self, request: Instance) -> tuple[Messages, str]:
        """The context as a user's message, with the document's pictures if one is named, and the continuation."""
        context, continuation, *place = request.args
        pictures = []
        if place:
            make_pictures, *place = place
            document = self._document(*place)
            pictures = [{"type": "image", "image": picture} for picture in make_pictures(document) or ()]
            continuation = continuation(document) if callable(continuation) else continuation
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": context}]}], str(continuation)


def _options_of(request: Instance) -> str:
    return repr(sorted(request.args[2].items()))


def _style(options: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation options as `ModelAnswerer.converse` takes them; those it does not know change nothing."""
    temperature = float(options.get("temperature") or 0.0)
    if options.get("do_sample") is False:
        temperature = 0.0
    elif options.get("do_sample") and not temperature:
        temperature = 1.0
    for name, value in (("num_beams", options.get("num_beams") or 1), ("top_p", options.get("top_p") or 1)):
        if value != 1 and (name == "num_beams" or temperature):
            raise ValueError(f"the task asks for {name}={value}, which VL-Mamba does not offer; override it: {name}=1")
    until = options.get("until") or ()
    return {
        "max_new_tokens": int(options.get("max_new_tokens") or 1024),
        "temperature": temperature,
        "until": (until,) if isinstance(until, str) else tuple(until),
    }
