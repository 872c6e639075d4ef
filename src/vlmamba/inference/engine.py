"""The engine: a thread that reads prompts and draws answers, as many at a time as there are slots.

Each turn reads a stretch of the prompts of those who came last, all together, and draws one token for everybody who is
answering. So a long prompt holds up the answers of others by no more than a stretch. On a GPU the tokens of a turn are
looked at, turned into text and given out while the next turn is computed; who ended there has read a token too many,
which nobody sees.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias

from vlmamba.inference.request import Answer, Picture, Piece, Request, Sampling
from vlmamba.inference.runner import Runner
from vlmamba.inference.scheduler import Scheduler
from vlmamba.inference.state_cache import StateCache
from vlmamba.inference.text import Writer

if TYPE_CHECKING:
    from vlmamba.models.processor import VLMambaProcessor
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

Drawing: TypeAlias = tuple[Sequence[Request], Callable[[], list[int]]]
"""Who gets a token, and what tells the tokens once they are there."""
STRETCH = 4096  # tokens that are read in one turn, padding included
TAIL = 64  # a stretch of so many is a short one
LONGEST_PROMPT = 1 << 20  # tokens
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stretch:
    """What a request reads in a turn: from where it is up to `end`, with the pictures in between."""

    request: Request
    end: int
    pictures: tuple[Picture, ...]

    @property
    def length(self) -> int:
        return self.end - self.request.read

    @property
    def ends_with_pictures(self) -> bool:
        """Whether it ends where the prompt's last picture does, so that the state is one to keep."""
        return bool(self.pictures) and self.end == self.request.pictures[-1].end < len(self.request.ids)

    @property
    def beginning(self) -> tuple[object, ...]:
        """What two prompts share that begin alike."""
        return tuple(self.request.ids[: self.end]), tuple(picture.digest for picture in self.request.pictures)


class Engine:
    """Answers chats, from any number of threads.

    Args:
        model, processor: in eval mode, on their device. The engine is from now on the only one to use them.
        name: what the model is called by those who ask.
        slots: answers made at once, each the size of one state. waiting: requests that may wait for one.
        cache_bytes: for states of prompts that were read before.
        options: as `Runner` takes them, for tests.
    """

    def __init__(
        self,
        model: VLMambaForConditionalGeneration,
        processor: VLMambaProcessor,
        *,
        name: str = "vl-mamba",
        slots: int = 64,
        waiting: int = 256,
        cache_bytes: int = 2 << 30,
        **options: Any,
    ) -> None:
        if slots < 1 or waiting < 1 or cache_bytes < 0:
            raise ValueError(
                f"slots is {slots}, waiting {waiting}, cache_bytes {cache_bytes}: expected 1, 1, 0 or more"
            )
        self.name = name
        self._processor = processor
        self._runner = Runner(model, processor, slots, **options)
        self._scheduler = Scheduler(slots, waiting)
        self._cache = StateCache(cache_bytes)
        self._writers: dict[Request, Writer] = {}
        self._drawing: list[Drawing] = []
        self._totals = {"requests": 0, "prompt_tokens": 0, "cached_prompt_tokens": 0, "generated_tokens": 0}
        self._tails_next = True
        self._thread = threading.Thread(target=self._work, name="vlmamba-engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        messages: Sequence[dict[str, Any]],
        sampling: Sampling | None = None,
        deliver: Callable[[Piece], None] | None = None,
    ) -> Answer:
        """Puts a chat into the line. Pictures are scaled here, on the caller's thread.

        Args:
            messages: as `processor.encode_messages` takes them, pictures as `image` parts: files or Pillow images.
            deliver: is given every piece on the engine's thread, and must return at once; without it, iterate over the
                answer.

        Raises:
            ValueError: messages that the template cannot take, a picture that cannot be read, too long a prompt.
            Overloaded: too many requests wait, or the engine is closed.
        """
        ids, images = self._processor.encode_messages(messages, add_generation_prompt=True)
        if len(ids) > LONGEST_PROMPT:
            raise ValueError(f"the prompt has {len(ids):,} tokens; at most {LONGEST_PROMPT:,} are read")
        request = Request(ids, self._pictures(ids, images), sampling or Sampling(), Answer(len(ids), deliver))
        self._scheduler.submit(request)
        return request.answer

    def stats(self) -> dict[str, float]:
        """What is going on now, and totals since the start."""
        now: dict[str, float] = {
            "running": len(self._scheduler.active),
            "waiting": self._scheduler.waiting,
            "slots": self._scheduler.slots,
            "cache_bytes": self._cache.nbytes,
            "cache_entries": len(self._cache),
        }
        return now | {f"{name}_total": value for name, value in self._totals.items()}

    def close(self) -> None:
        """Ends all answers as cancelled, and the thread."""
        self._scheduler.close()
        self._thread.join()

    def _pictures(self, ids: Sequence[int], images: Sequence[Any]) -> tuple[Picture, ...]:
        """The pictures with the places of their placeholders, which stand together."""
        token, size = self._processor.image_token_id, self._processor.num_image_tokens
        runs = [list(run) for is_image, run in groupby(range(len(ids)), lambda i: ids[i] == token) if is_image]
        begins = [begin for run in runs for begin in run[::size]]
        pictures = []
        for begin, image in zip(begins, images, strict=True):
            pixels = self._processor.image_pixels(image)
            digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
            pictures.append(Picture(pixels, digest, begin, begin + size))
        return tuple(pictures)

    # What follows runs on the engine's thread ------------------------------------------------------------------------

    def _work(self) -> None:
        with self._runner.on_device():
            while not self._scheduler.closed:
                try:
                    self._scheduler.wait()
                    self._turn()
                except Exception as error:  # whatever it is: those who wait find a clean engine
                    _LOG.exception("a turn failed; the answers under way end")
                    self._give_up("error", f"{type(error).__name__}: {error}")
        self._give_up("cancelled", waiting=True)

    def _turn(self) -> None:
        admitted, gone = self._scheduler.admit()
        for request in gone:
            request.answer.deliver(Piece("", 0, "cancelled"))
        for request in admitted:
            self._begin(request)
        for request in [r for r in self._scheduler.active if r.answer.cancelled]:
            self._end(request, "cancelled")
        before, self._drawing = self._drawing, []
        answering = [r for r in self._scheduler.active if 0 < r.asked < r.sampling.max_new_tokens]
        if answering:
            logits = self._runner.step([request.slot for request in answering])
            for request in answering:
                request.read += 1
            self._draw(answering, logits)
        for drawing in before:
            self._give_out(*drawing)
        self._read([r for r in self._scheduler.active if not r.asked])
        if not self._runner.ahead:
            before, self._drawing = self._drawing, []
            for drawing in before:
                self._give_out(*drawing)

    def _begin(self, request: Request) -> None:
        self._runner.put(request.slot, None)
        self._writers[request] = Writer(self._processor.tokenizer, request.sampling.stop)
        self._totals["requests"] += 1
        self._totals["prompt_tokens"] += len(request.ids)

    def _read(self, requests: list[Request]) -> None:
        """Reads a stretch of as many prompts as fit into one turn, and are about as long: in turn short ones, such as
        the questions after pictures, and others."""
        for request in requests:
            if not request.read:
                self._recall(request)
        stretches = [Stretch(request, *request.next_stretch(STRETCH)) for request in requests]
        tails = [stretch for stretch in stretches if stretch.length <= TAIL]
        others = [stretch for stretch in stretches if stretch.length > TAIL]
        first, second = (tails, others) if self._tails_next else (others, tails)
        self._tails_next = not self._tails_next
        chosen = self._fitting(first or second)
        if not chosen:
            return
        try:
            self._read_chosen(chosen)
        except Exception as error:  # such as no memory for so many pictures: the states of others are as they were
            _LOG.exception("%d prompts could not be read", len(chosen))
            for stretch in chosen:
                self._end(stretch.request, "error", error=f"{type(error).__name__}: {error}")

    def _fitting(self, stretches: list[Stretch]) -> list[Stretch]:
        chosen: list[Stretch] = []
        begun = set()
        keeps = self._cache.holds(self._runner.state_bytes)
        for stretch in stretches:
            # Who begins as somebody before, and would read the same pictures, waits a turn and finds them read.
            if keeps and stretch.ends_with_pictures:
                if stretch.beginning in begun:
                    continue
                begun.add(stretch.beginning)
            longest = max(stretch.length, *(other.length for other in chosen), 0)
            if chosen and longest * (len(chosen) + 1) > STRETCH:
                break
            chosen.append(stretch)
        return chosen

    def _recall(self, request: Request) -> None:
        """Gives the slot the state that has read most of the prompt."""
        request.read, state = self._cache.longest(request.ids, request.pictures)
        if state is not None:
            self._runner.put(request.slot, state)
            request.answer.cached_tokens = request.read
            self._totals["cached_prompt_tokens"] += request.read

    def _read_chosen(self, chosen: list[Stretch]) -> None:
        rows = [stretch.request.ids[stretch.request.read : stretch.end] for stretch in chosen]
        shown = [picture for stretch in chosen for picture in stretch.pictures]
        logits = self._runner.read(rows, [stretch.request.slot for stretch in chosen], shown)
        done = []
        for row, stretch in enumerate(chosen):
            request = stretch.request
            request.read = stretch.end
            if stretch.end == len(request.ids):
                done.append(row)
                continue
            self._scheduler.defer(request)  # a long prompt lets others read before its next stretch
            if stretch.ends_with_pictures:
                self._keep(request)
        if done:
            answering = [chosen[row].request for row in done]
            self._draw(answering, logits if len(done) == len(chosen) else logits[done])

    def _draw(self, requests: Sequence[Request], logits: Any) -> None:
        """Begins to draw the next token of each."""
        for request in requests:
            request.asked += 1
        chances = [r.chance.random() for r in requests]
        tell = self._runner.draw(logits, [r.slot for r in requests], [r.sampling for r in requests], chances)
        self._drawing.append((requests, tell))

    def _give_out(self, requests: Sequence[Request], tell: Callable[[], list[int]]) -> None:
        """What the tokens say, as far as the text is certain; nothing of those who have ended since."""
        end = self._processor.tokenizer.eos_token_id
        for request, token in zip(requests, tell(), strict=True):
            if request not in self._writers:
                continue
            request.drawn.append(token)
            self._totals["generated_tokens"] += 1
            text = "" if token == end else self._writers[request].write(token)
            if token == end or self._writers[request].stopped:
                self._end(request, "stop", text)
            elif len(request.drawn) >= request.sampling.max_new_tokens:
                self._end(request, "length", text)
            else:
                request.answer.deliver(Piece(text, len(request.drawn), None))

    def _keep(self, request: Request) -> None:
        """Remembers the state, and so all that it has read; where memory does not suffice, half of the others go."""
        ids = (request.ids + request.drawn)[: request.read]
        pictures = [picture for picture in request.pictures if picture.end <= request.read]
        try:
            self._cache.put(ids, pictures, self._runner.state_bytes, lambda: self._runner.take(request.slot))
        except (MemoryError, RuntimeError):  # torch's OutOfMemoryError is one
            _LOG.exception("a state could not be kept")
            self._cache.halve()

    def _end(self, request: Request, finish: str, text: str = "", error: str = "") -> None:
        if finish in ("stop", "length"):
            self._keep(request)  # the next turn of the conversation begins with this one
        self._scheduler.release(request)
        text += self._writers.pop(request).rest()
        request.answer.deliver(Piece(text, len(request.drawn), finish, error))

    def _give_up(self, finish: str, error: str = "", waiting: bool = False) -> None:
        """Ends all that are under way, and those who wait too if `waiting`."""
        self._writers.clear()
        self._drawing.clear()
        for request in self._scheduler.give_up(waiting):
            request.answer.deliver(Piece("", len(request.drawn), finish, error))
