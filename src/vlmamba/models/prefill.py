"""Reading a prompt: short ones as a captured CUDA graph, so that launching a thousand kernels costs nothing; long ones
in pieces through the state, so that memory does not grow with the length.

The causal LM's `forward` hands every prompt to `read`, which reads it where it can and says once why where it cannot.
Graphs are captured for buckets of (batch, length), at a bucket's second prompt: the first one runs kernel by kernel
through the same code, and a bucket that never comes again costs nothing more. A shorter prompt fills its bucket with
padding at the end, which the ops leave out and which a causal model cannot see: the results are exact.

    Bucket      fixed memory for prompts of one size, and the graph that reads it
    Reader      the fused weights of one model and its buckets

Shapes: B batch, L length, n positions asked for, d model width, D channels, N state size, W convolution width,
V vocabulary.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmamba import ops
from vlmamba.models import decode
from vlmamba.models.padding import Compaction
from vlmamba.models.state import MambaState
from vlmamba.ops.decode import Head, Layer

CHUNK = 8192  # tokens, all rows together, that are read at once; at 2.8b their activations take 0.7 GB
SHORTEST = 64  # positions of a piece at least, however many rows there are
ROWS = 8  # more rows keep the device busy without a graph
KEPT = 8  # graphs of a model; the least recently used one goes
_Outputs = tuple[Tensor, ...]
Capture = Callable[[Callable[[], _Outputs]], Callable[[], _Outputs]]


def bucket_of(length: int) -> int:
    """The bucket's length for a prompt: sixteens up to 64 (where reading the weights takes the time, whatever the
    length), four steps an octave up to 512 (less than 20 % padding), eight above (less than 12 %)."""
    if length <= 64:
        return -(-length // 16) * 16
    octave = 1 << ((length - 1).bit_length() - 1)
    step = octave // (4 if octave < 512 else 8)
    return -(-length // step) * step


def piece_of(batch: int) -> int:
    """Positions that `batch` rows read at once."""
    return max(SHORTEST, CHUNK // batch)


@dataclass(frozen=True)
class Weights:
    """What a prompt is read with; `stream` is the dtype of the residual stream."""

    layers: Sequence[Layer]
    head: Head
    stream: torch.dtype

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        layers, head = decode.fused_weights(model)
        dtype = head.embedding.dtype
        wide = model.backbone.layers[0].residual_in_fp32
        return cls(layers, head, torch.promote_types(dtype, torch.float32) if wide else dtype)

    def read(
        self, hidden_BLd: Tensor, seq_idx: Tensor | None, conv: Sequence[Tensor], ssm: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Tokens after the states conv (B, W-1, D) and ssm (B, D, N) of every layer: the last norm's output (B, L, d)
        and the new states. Eight kernels a layer: sum and norm, four products, convolution, scan (two)."""
        dtype = self.head.embedding.dtype
        stream, delta = hidden_BLd.to(self.stream), None
        new_conv: list[Tensor] = []
        new_ssm: list[Tensor] = []
        for layer, conv_BWD, ssm_BDN in zip(self.layers, conv, ssm, strict=True):
            if delta is None:
                normed = ops.rms_norm(stream, layer.norm, layer.eps, dtype)
            else:
                normed, stream = ops.add_norm(stream, delta, layer.norm, layer.eps, dtype)
            delta, conv_BWD, ssm_BDN = _mix(layer, normed, seq_idx, conv_BWD, ssm_BDN)
            new_conv.append(conv_BWD)
            new_ssm.append(ssm_BDN)
        assert delta is not None
        normed, _ = ops.add_norm(stream, delta, self.head.norm, self.head.eps, dtype)
        return normed, new_conv, new_ssm

    def logits(self, normed: Tensor) -> Tensor:
        return F.linear(normed, self.head.matrix.weight)

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.head.embedding)

    def no_state(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """States (B, W-1, D) and (B, D, N) before the first token, views of one piece of memory each."""
        (channels, states), width = self.layers[0].A.shape, self.layers[0].conv_weight.shape[1]
        new = self.head.embedding.new_zeros
        conv = new(len(self.layers), batch, width - 1, channels)
        return list(conv), list(new(len(self.layers), batch, channels, states, dtype=torch.float32))


def _mix(
    layer: Layer, x_BLd: Tensor, seq_idx: Tensor | None, conv: Tensor, ssm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixer of `models.mamba` from its weights, with A at hand."""
    x_BLD, z_BLD = F.linear(x_BLd, layer.in_proj.weight).chunk(2, dim=-1)
    x_BLD, conv = ops.causal_conv1d(
        x_BLD, layer.conv_weight, layer.conv_bias, activation="silu", initial_state=conv, seq_idx=seq_idx,
        return_final_state=True,
    )  # fmt: skip
    states, rank = layer.A.shape[1], layer.dt_proj.shape[1]
    dt, B_BLN, C_BLN = F.linear(x_BLD, layer.x_proj).split([rank, states, states], dim=-1)
    y_BLD, ssm = ops.selective_scan(
        x_BLD, F.linear(dt, layer.dt_proj), layer.A, B_BLN, C_BLN, layer.D, z_BLD, layer.dt_bias, initial_state=ssm,
        seq_idx=seq_idx, return_final_state=True,
    )  # fmt: skip
    return F.linear(y_BLD, layer.out_proj.weight), conv, ssm


class Bucket:
    """Prompts of `batch` rows and up to `length` positions, in fixed memory.

    Args:
        padded: whether prompts may be shorter, at the price of a tenth of the time (the ops then look for the end).
        capture: makes a function that does what a function did when it was called, faster, and gives the same tensors.
    """

    def __init__(self, weights: Weights, batch: int, length: int, padded: bool, capture: Capture):
        head = weights.head
        with torch.inference_mode(False):
            self.hidden = head.embedding.new_zeros(batch, length, head.embedding.shape[1])
            self.last = torch.zeros(batch, dtype=torch.int64, device=head.embedding.device)
            self.seq_idx = torch.zeros(batch, length, dtype=torch.int32, device=self.last.device) if padded else None
            self.conv, self.ssm = weights.no_state(batch)
        self._weights, self._capture, self._met, self._at_start = weights, capture, False, True
        self._replay: Callable[[], _Outputs] | None = None

    def run(
        self, hidden: Tensor, seq_idx: Tensor | None, last: Tensor | None, start: MambaState | None
    ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Reads hidden (B, L, d), L at most the bucket's, seq_idx (B, L) as the ops take it, after the state `start`.

        Returns:
            logits (B, V) at `last` (B,) if given, the last norm's output (B, length, d), and the states. All of it is
            memory that the next prompt overwrites.
        """
        self.hidden[:, : hidden.shape[1]] = hidden
        if self.seq_idx is not None:
            self.seq_idx[:, : hidden.shape[1]] = 0 if seq_idx is None else seq_idx
            self.seq_idx[:, hidden.shape[1] :] = -1
        if last is not None:
            self.last.copy_(last)
        if start is not None:
            decode.copy_all(self.conv, start.conv)
            decode.copy_all(self.ssm, start.ssm)
        elif not self._at_start:
            torch._foreach_zero_(self.conv)
            torch._foreach_zero_(self.ssm)
        self._at_start = start is None
        if self._replay is None and self._met:
            self._replay = self._capture(self._compute)
        self._met = True
        logits, normed, *states = (self._replay or self._compute)()
        return logits, normed, states[: len(self.conv)], states[len(self.conv) :]

    def _compute(self) -> _Outputs:
        normed, conv, ssm = self._weights.read(self.hidden, self.seq_idx, self.conv, self.ssm)
        at = self.last[:, None, None].expand(-1, 1, normed.shape[2])
        return (self._weights.logits(normed.gather(1, at)[:, 0]), normed, *conv, *ssm)


def as_graph(device: torch.device) -> Capture:
    """Captures functions as CUDA graphs that share their memory: what one gives must be used before another runs."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], _Outputs]) -> Callable[[], _Outputs]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (a data loader's) may go on using the device meanwhile.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function()

        def replay() -> _Outputs:
            graph.replay()
            return outputs

        return replay

    return capture


@dataclass
class Prompt:
    """hidden (B, L, d), padding at the end of its rows; ids (B, L) instead where they are still to be looked up.

    Attributes:
        seq_idx: (B, L) int32, -1 for padding; None if there is none.
        places: (B, n), where the positions asked for stand now; None for all of them, in order.
        padding: how to bring all of them back into order.
    """

    hidden: Tensor | None
    ids: Tensor | None
    seq_idx: Tensor | None
    places: Tensor | None
    padding: Compaction | None

    @classmethod
    def of(
        cls, ids: Tensor | None, hidden: Tensor | None, mask: Tensor | Compaction | None, keep: int | Tensor
    ) -> Prompt:
        """`keep` as `logits_to_keep` of the causal LM."""
        tokens = ids if hidden is None else hidden
        assert tokens is not None
        batch, length = tokens.shape[:2]
        padding = Compaction.of(mask, None, tokens.shape[:2])
        if padding is not None and padding.order is not None:
            ids = None if ids is None else ids.gather(1, padding.order)
            hidden = None if hidden is None else padding.to_front(hidden)
        places = None
        if isinstance(keep, Tensor) or keep:
            every = torch.arange(length, device=tokens.device)
            places = (every[-keep:] if isinstance(keep, int) else every[keep]).expand(batch, -1)
            if padding is not None and padding.order is not None:
                places = padding.order.argsort(1).gather(1, places)
        return cls(hidden, ids, None if padding is None else padding.seq_idx, places, padding)

    @property
    def size(self) -> tuple[int, int]:
        tokens = self.ids if self.hidden is None else self.hidden
        assert tokens is not None
        return tokens.shape[0], tokens.shape[1]

    def piece(self, where: slice, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Some positions (B, l, d)."""
        if self.hidden is not None:
            return self.hidden[:, where]
        assert self.ids is not None
        return embed(self.ids[:, where])

    def restore(self, hidden: Tensor) -> Tensor:
        return hidden if self.padding is None else self.padding.restore(hidden)


Piece = Callable[[Tensor, Tensor | None], Tensor]  # hidden (B, l, d) and seq_idx to the last norm's output (B, l, d)


def in_pieces(prompt: Prompt, embed: Callable[[Tensor], Tensor], read: Piece) -> Tensor:
    """The last norm's output at the positions asked for (B, n, d), from `read` on one piece after another; it keeps the
    state. No more than one piece is in memory but for what is asked for."""
    batch, length = prompt.size
    parts: list[Tensor] = []
    kept: Tensor | None = None
    for first in range(0, length, piece_of(batch)):
        piece = slice(first, min(first + piece_of(batch), length))
        normed = read(prompt.piece(piece, embed), None if prompt.seq_idx is None else prompt.seq_idx[:, piece])
        if prompt.places is None:
            parts.append(normed)
            continue
        at = prompt.places - first
        here = _at(normed, at.clamp(0, normed.shape[1] - 1))
        is_here = (at >= 0) & (at < normed.shape[1])
        kept = here if kept is None else torch.where(is_here[..., None], here, kept)
    return prompt.restore(torch.cat(parts, 1)) if kept is None else kept


def _at(x_BLd: Tensor, places_Bn: Tensor) -> Tensor:
    return x_BLd.gather(1, places_Bn[..., None].expand(-1, -1, x_BLd.shape[2]))


class Reader:
    """The fused weights of a causal LM, and a bucket for every size of prompt met lately.

    Args:
        model: a `VLMambaForCausalLM`, in eval mode. capture: see `Bucket`; a CUDA graph if not given.
    """

    def __init__(self, model: nn.Module, capture: Capture | None = None):
        self.weights = Weights.of(model)
        self.signature = decode.signature(model)
        self._parameters = list(model.parameters())  # while they are held here, a graph may read them
        self._capture = capture or as_graph(self.weights.head.embedding.device)
        self.buckets: OrderedDict[tuple[int, int, bool], Bucket] = OrderedDict()

    def bucket(self, batch: int, length: int, padded: bool) -> Bucket:
        """The bucket for a prompt of this size; made at the first call."""
        key = (batch, bucket_of(length), padded or bucket_of(length) > length)
        if key not in self.buckets:
            while len(self.buckets) >= KEPT:
                self.buckets.popitem(last=False)
            self.buckets[key] = Bucket(self.weights, *key, self._capture)
        self.buckets.move_to_end(key)
        return self.buckets[key]

    def read(
        self, prompt: Prompt, start: MambaState | None, holds: Callable[[], bool] = lambda: True
    ) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
        """Logits (B, n, V), and the states after a prompt in memory that the next prompt may overwrite; `start` is left
        as it is. Where a graph runs, `holds` is asked while the device works; if it says no, the result is None."""
        batch, length = prompt.size
        if batch <= ROWS and batch * bucket_of(length) <= CHUNK:
            return self._read_bucket(prompt, start, holds)
        if not holds():
            return None
        conv, ssm = self.weights.no_state(batch)
        if start is not None:
            conv, ssm = ([t for t in held if t is not None] for held in (start.conv, start.ssm))

        def read(hidden: Tensor, seq_idx: Tensor | None) -> Tensor:
            nonlocal conv, ssm
            normed, conv, ssm = self.weights.read(hidden, seq_idx, conv, ssm)
            return normed

        return self.weights.logits(in_pieces(prompt, self.weights.embed, read)), conv, ssm

    def _read_bucket(
        self, prompt: Prompt, start: MambaState | None, holds: Callable[[], bool]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
        (batch, length), places = prompt.size, prompt.places
        hidden = prompt.piece(slice(None), self.weights.embed)
        bucket = self.bucket(batch, length, prompt.seq_idx is not None)
        last = places[:, 0] if places is not None and places.shape[1] == 1 else None
        logits, normed, conv, ssm = bucket.run(hidden, prompt.seq_idx, last, start)
        if not holds():
            return None
        if last is not None:
            return logits[:, None].clone(), conv, ssm
        normed = prompt.restore(normed[:, :length]) if places is None else _at(normed, places)
        return self.weights.logits(normed), conv, ssm


_readers: weakref.WeakKeyDictionary[nn.Module, Reader] = weakref.WeakKeyDictionary()
_told: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def read(
    model: nn.Module,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | Compaction | None,
    state: MambaState | None,
    use_cache: bool | None,
    logits_to_keep: int | Tensor,
) -> tuple[Tensor, MambaState | None] | None:
    """A prompt, as the causal LM's `forward` has it: logits (B, n, V) and the state after it, which is `state` where
    that was given. None where the modules shall read it in one piece."""
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if tokens is None or (input_ids is not None and inputs_embeds is not None) or tokens.numel() == 0:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or model.training:
        return None
    (batch, length), slots = tokens.shape[:2], None if state is None else state.slots
    if slots is not None and (length == 1 or slots != batch):
        return None
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    on_gpu = tokens.is_cuda and not torch.is_autocast_enabled("cuda")
    if inputs_embeds is not None and inputs_embeds.dtype != model.lm_head.weight.dtype:
        on_gpu = False
    if not on_gpu:
        _readers.pop(model, None)
        if length <= piece_of(batch):
            return None
    prompt = Prompt.of(input_ids, inputs_embeds, attention_mask, logits_to_keep)
    if state is None and (model.config.use_cache if use_cache is None else use_cache):
        state = MambaState.empty(len(model.backbone.layers))
    logits = _through_reader(model, prompt, state) if on_gpu else None
    if logits is None and length > piece_of(batch):
        logits = _through_modules(model, prompt, state)
    return None if logits is None else (logits, state)


def _through_modules(model: nn.Module, prompt: Prompt, state: MambaState | None) -> Tensor:
    """Logits (B, n, V), from the modules piece by piece."""
    state = MambaState.empty(len(model.backbone.layers)) if state is None else state

    def read(hidden: Tensor, seq_idx: Tensor | None) -> Tensor:
        return model.backbone(inputs_embeds=hidden, cache_params=state, seq_idx=seq_idx).last_hidden_state

    return model.lm_head(in_pieces(prompt, model.backbone.embeddings, read))


def _through_reader(
    model: nn.Module, prompt: Prompt, state: MambaState | None, capture: Capture | None = None
) -> Tensor | None:
    """Logits (B, n, V), and the state moved on; None if the fused weights cannot stand for the model."""
    start = state if state is not None and state.slots is not None else None
    held = _readers.get(model)
    result = None if held is None else held.read(prompt, start, functools.partial(_is_current, held, model))
    if result is None:
        _readers.pop(model, None)
        reason = decode.refusal(model)
        if reason is not None:
            _say(model, reason)
            return None
        held = _readers[model] = Reader(model, capture)
        result = held.read(prompt, start)
    assert result is not None
    logits, conv, ssm = result
    if state is not None:
        decode.hand_over(model, state, conv, ssm)
    return logits


def _is_current(reader: Reader, model: nn.Module) -> bool:
    """Whether the reader's weights are the model's (looking at a thousand modules and parameters takes milliseconds);
    the decoder, which would ask the same next, is told."""
    signature = decode.signature(model)
    if reader.signature != signature or decode.refusal(model) is not None:
        return False
    decode.vouch(model, signature)
    return True


def _say(model: nn.Module, reason: str) -> None:
    unusual = not model.training and "not in use" not in reason
    if unusual and _told.get(model) != reason:
        _told[model] = reason
        warnings.warn(f"prompts are read without fused kernels and graphs: {reason}", RuntimeWarning, stacklevel=5)
