"""Decoding as fast as the weights can be read: one token for all slots through a captured CUDA graph, or in one native
call on the CPU (`decode_cpu.py`).

`generate` comes here by itself: the causal LM's `forward` hands every one-token continuation to `one_token`, which runs
it where it can and says once why where it cannot. `generate_tokens` is the loop without transformers around it.

    Step      one token for a batch of slots of a state pool, captured at once, replayed ever after (the engine's unit)
    Lane      a Step with a pool of its own, and the `MambaState` whose sequences live in it now
    Decoder   the fused weights of one model and its lanes by batch size

Shapes: B batch, S slots, V vocabulary.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmamba.models.padding import towards_end
from vlmamba.models.state import MambaState
from vlmamba.ops import dispatch
from vlmamba.ops.decode import HOST_ROWS, Buffers, Head, Layer, Matrix, Plan, quantise, step

if TYPE_CHECKING:
    from vlmamba.models.decode_cpu import HostDecoder

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
LANES = 4  # of a model, each with memory for its states; the one not used for longest goes
SEEDS = (1 << 62) - 1
# By device: which kernels, and the dtypes of a model that they read.
_KERNELS = {
    "cuda": ("triton", (torch.float32, torch.bfloat16, torch.float16)),
    "cpu": ("cpu", (torch.float32, torch.bfloat16)),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def refusal(model: nn.Module) -> str | None:
    """Why the fused step cannot stand for `model` (a causal LM of ours); None if it can."""
    weight = model.lm_head.weight
    kind = weight.device.type
    if kind not in _KERNELS:
        return f"the model is on {kind}"
    if model.training:
        return "the model is in training mode"
    name, dtypes = _KERNELS[kind]
    if dispatch.choose("decode", weight.device, weight.dtype) != name:
        return f"the {name} kernels are not in use"
    if weight.dtype not in dtypes:
        return f"there is no form for {weight.dtype}"
    return structure_refusal(model)


def structure_refusal(model: nn.Module) -> str | None:
    """As `refusal`, from the modules alone: only unchanged modules can be read through their weights."""
    dtype = model.lm_head.weight.dtype
    first = model.backbone.layers[0].mixer
    if first.state_size & (first.state_size - 1):
        return f"a state size of {first.state_size} is no power of two"
    for name, module in model.named_modules():
        own = name.rsplit(".", 1)[-1]
        if has_hooks(module):
            return f"{name or 'the model'} has hooks or a replaced forward"
        if own.endswith("_proj") or own == "lm_head":
            if type(module) is not nn.Linear:
                return f"{name} is a {type(module).__name__}, not a plain Linear (an adapter, or quantised)"
            if module.bias is not None:
                return f"{name} has a bias"
        elif not type(module).__module__.startswith(("vlmamba.models.", "torch.nn.modules.")):
            return f"{name} is a {type(module).__name__}"
        if own == "conv1d" and module.activation != "silu":
            return f"{name} has the activation {module.activation!r}"
    for name, p in model.named_parameters():
        expected = torch.float32 if ".ssm." in name else dtype
        if p.dtype != expected or not p.is_contiguous():
            return f"{name} is {p.dtype}{'' if p.is_contiguous() else ', not contiguous'}; {expected} was expected"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _HOOKS)


@torch.no_grad()
def fused_weights(model: nn.Module, int8: bool = False) -> tuple[list[Layer], Head]:
    """The weights of a causal LM as the kernels take them: the parameters themselves, but A (computed from A_log) and,
    with `int8`, copies of the large matrices (weight only, one scale per output)."""

    def matrix(weight: Tensor) -> Matrix:
        return quantise(weight) if int8 else Matrix(weight.detach())

    layers = []
    for block in model.backbone.layers:
        mixer = block.mixer
        A, D, dt_bias = (t.detach() for t in mixer.ssm(block.norm.weight))
        bias = mixer.conv1d.bias
        layers.append(Layer(
            norm=block.norm.weight.detach(), eps=block.norm.eps, in_proj=matrix(mixer.in_proj.weight),
            conv_weight=mixer.conv1d.weight.detach().squeeze(1), conv_bias=None if bias is None else bias.detach(),
            x_proj=mixer.x_proj.weight.detach(), dt_proj=mixer.dt_proj.weight.detach(), dt_bias=dt_bias,
            A=A.contiguous(), D=D, out_proj=matrix(mixer.out_proj.weight),
        ))  # fmt: skip
    final, embedding = model.backbone.norm_f, model.backbone.embeddings.weight.detach()
    head = Head(embedding=embedding, norm=final.weight.detach(), eps=final.eps, matrix=matrix(model.lm_head.weight))
    return layers, head


def default_plan(device: torch.device) -> Plan:
    """How to cut the kernels on this device."""
    hopper = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return Plan(pdl=hopper)


def new_pool(layers: Sequence[Layer], slots: int, dtype: torch.dtype) -> MambaState:
    """A state pool of `slots` sequences and a spare slot, for `Step`."""
    (channels, states), width = layers[0].A.shape, layers[0].conv_weight.shape[1]
    device = layers[0].A.device
    with torch.inference_mode(False):
        return MambaState.zeros(len(layers), slots + 1, channels, states, width, dtype=dtype, device=device)


class Step:
    """One token for `batch` rows, as a CUDA graph over fixed memory.

    Write `buffers.tokens` and `buffers.slots` (and temperature, seed, stops where sampling is wanted), call `run`,
    read `buffers.logits` and the new `buffers.tokens`, which the next `run` takes up by itself. Rows without a sequence
    point at the pool's last slot.
    """

    def __init__(
        self, layers: Sequence[Layer], head: Head, pool: MambaState, batch: int, plan: Plan | None = None,
        capture: bool = True, implementation: str | None = None,
    ):  # fmt: skip
        device = head.embedding.device
        self.batch, self.spare = batch, (pool.slots or 1) - 1
        self.plan = plan or default_plan(device)
        if not capture:
            # Kernels that start early read states that the step before may still write; between replays of a graph
            # there is a barrier, between plain launches there is none.
            self.plan = replace(self.plan, pdl=False)
        with torch.inference_mode(False):
            self.buffers = Buffers.make(batch, layers[0], head, self.plan)
        if device.type == "cuda":  # one tap of all channels after another, as the kernels read them
            layers = [replace(layer, conv_weight=layer.conv_weight.t().contiguous().t()) for layer in layers]
        self._arguments = (layers, head, pool.conv, pool.ssm, self.buffers, self.plan, implementation)
        self._graph: torch.cuda.CUDAGraph | None = None
        if capture:
            self._capture(device)

    @torch.no_grad()
    def _capture(self, device: torch.device) -> None:
        self.buffers.slots.fill_(self.spare)  # trial runs must not touch anybody's state
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(2):  # compiles the kernels, wakes the libraries
                step(*self._arguments)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph):
            step(*self._arguments)
        self._graph = graph
        self.buffers.count.zero_()

    @torch.no_grad()
    def run(self) -> None:
        """Reads one token per row; asynchronous."""
        if self._graph is None:
            step(*self._arguments)
        else:
            self._graph.replay()


class Lane:
    """A step with a pool of its own. One state at a time lives here; another one that comes pushes it out, into memory
    of its own, so interleaved generations stay right."""

    def __init__(self, layers: Sequence[Layer], head: Head, batch: int, **options: Any):
        self.pool = new_pool(layers, batch, head.embedding.dtype)
        self.step = Step(layers, head, self.pool, batch, **options)
        self._rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._owner: weakref.ref[MambaState] | None = None

    def holds(self, state: MambaState) -> bool:
        """Whether the state's sequences live in this pool, and nothing replaced its tensors."""
        if self._owner is None or self._owner() is not state:
            return False
        conv, ssm = self._rows
        return all(a is b for a, b in zip(state.conv, conv)) and all(a is b for a, b in zip(state.ssm, ssm))

    def adopt(self, state: MambaState) -> None:
        """Copies the state in, unless it is here; from now on its tensors are this pool's."""
        if self.holds(state):
            return
        batch = state.slots
        assert batch is not None
        self.push_out()
        conv, ssm = ([t[:batch] for t in held if t is not None] for held in (self.pool.conv, self.pool.ssm))
        copy_all(conv, state.conv)
        copy_all(ssm, state.ssm)
        self._rows = (conv, ssm)
        state.conv, state.ssm = list(conv), list(ssm)
        self._owner = weakref.ref(state)
        self.aim(batch)

    def lend(self, state: MambaState, batch: int) -> bool:
        """Gives an empty state its place here, with whatever stands there; False if another one lives here."""
        owner = self._owner() if self._owner is not None else None
        if owner is not None and self.holds(owner):
            return False
        conv, ssm = ([t[:batch] for t in held if t is not None] for held in (self.pool.conv, self.pool.ssm))
        self._rows, self._owner = (conv, ssm), weakref.ref(state)
        state.conv, state.ssm = list(conv), list(ssm)
        self.aim(batch)
        return True

    def aim(self, batch: int) -> None:
        """Points the first `batch` rows at their slots and the others at the spare one; no row ends by itself."""
        buffers = self.step.buffers
        buffers.slots.fill_(self.step.spare)
        buffers.slots[:batch] = torch.arange(batch, dtype=torch.int32, device=buffers.slots.device)
        buffers.stops.fill_(-1)
        buffers.temperature.zero_()

    def push_out(self) -> None:
        """Gives the state that lives here memory of its own."""
        owner = self._owner() if self._owner is not None else None
        if owner is not None and self.holds(owner):
            owner.conv = [None if t is None else t.clone() for t in owner.conv]
            owner.ssm = [None if t is None else t.clone() for t in owner.ssm]
        self._owner = None


class Decoder:
    """The fused weights of a causal LM, and a lane for every batch size met so far.

    Args:
        model: a `VLMambaForCausalLM`, in eval mode. int8: read the large matrices as weight-only int8.
        plan, capture, implementation: for tests and benchmarks; see `Step`.
    """

    def __init__(self, model: nn.Module, *, int8: bool = False, **options: Any):
        self.layers, self.head = fused_weights(model, int8)
        self.signature = signature(model)
        self.checked = True
        self._options = options
        self._lanes: dict[int, Lane] = {}

    def lane(self, batch: int) -> Lane:
        """The lane for this many sequences; made, and its graph captured, at the first call."""
        bucket = rows_for(batch)
        if bucket not in self._lanes:
            while len(self._lanes) >= LANES:
                self._lanes.pop(next(iter(self._lanes))).push_out()
            self._lanes[bucket] = Lane(self.layers, self.head, bucket, **self._options)
        self._lanes[bucket] = self._lanes.pop(bucket)  # the last used stands last
        return self._lanes[bucket]

    def lend(self, state: MambaState, batch: int) -> bool:
        """Gives an empty state a place in the lane for this many sequences, if there is one and nobody lives there."""
        lane = self._lanes.get(rows_for(batch))
        return lane is not None and lane.lend(state, batch)

    def logits(self, tokens: Tensor, state: MambaState) -> Tensor:
        """Logits (B, V) float32 after one token per row (B,); valid until the next call. The state moves on."""
        lane = self.lane(len(tokens))
        lane.adopt(state)
        lane.step.buffers.tokens[: len(tokens)] = tokens
        lane.step.run()
        return lane.step.buffers.logits[: len(tokens)]

    @torch.no_grad()
    def tokens(
        self, tokens: Tensor, state: MambaState, count: int, *, stops: Sequence[int] = (), temperature: float = 0.0,
        seed: int = 0, limits: tuple[int, int] | None = None, every: int = 16, ended: Tensor | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Reads `tokens` (B,) and yields what follows, in blocks (B, n <= every) on the CPU, `count` in all or until
        every row has drawn one of `stops`. A row that has ended yields its end once, then anything; its state has read
        all but the end itself. limits: how many tokens of the vocabulary exist, and one never drawn (-1: none).
        ended: (B,) bool on the CPU, the rows whose token is an end already; their states stay as they are."""
        lane, batch = self.lane(len(tokens)), len(tokens)
        if len(stops) > len(lane.step.buffers.stops):
            raise ValueError(f"{len(stops)} stop tokens; at most {len(lane.step.buffers.stops)} can be watched for")
        buffers, last, done = lane.step.buffers, tokens, 0
        ended = torch.zeros(batch, dtype=torch.bool) if ended is None else ended.clone()
        ends, capacity = torch.tensor(list(stops), dtype=torch.int64), buffers.history.shape[1]

        def settle() -> None:
            lane.adopt(state)
            lane.aim(batch)
            buffers.tokens[:batch] = last
            buffers.temperature.fill_(temperature)
            buffers.seed.copy_(torch.arange(len(buffers.seed)) + ((seed << 20) & SEEDS))
            buffers.stops[: len(stops)] = ends.to(buffers.stops.device)
            buffers.limits.copy_(torch.tensor(limits or (buffers.logits.shape[1], -1)))
            buffers.count.fill_(done)
            buffers.slots[:batch].masked_fill_(ended.to(buffers.slots.device), lane.step.spare)

        try:
            while done < count and not bool(ended.all()):
                if not done or not lane.holds(state):  # others may have been here between two blocks
                    settle()
                block = min(every, count - done, capacity)
                for _ in range(block):
                    lane.step.run()
                at = torch.arange(done, done + block) % capacity
                drawn = buffers.history[:batch].cpu()[:, at]
                last = drawn[:, -1]
                ended |= torch.isin(drawn, ends).any(1)
                done += block
                yield drawn
        finally:
            if lane.holds(state):
                lane.aim(batch)

    def release(self) -> None:
        """Pushes every state out and forgets the lanes."""
        for lane in self._lanes.values():
            lane.push_out()
        self._lanes.clear()


def rows_for(batch: int) -> int:
    """Rows of the step that is captured for so many sequences."""
    return next((b for b in BUCKETS if b >= batch), -(-batch // 64) * 64)


_decoders: weakref.WeakKeyDictionary[nn.Module, Decoder | HostDecoder] = weakref.WeakKeyDictionary()
_in_int8: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_refused: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # since the last prompt
_told: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def read_as_int8(model: nn.Module, wanted: bool = True) -> None:
    """From now on one-token continuations of `model` (a causal LM of ours, or a VL-Mamba) read the large matrices as
    int8, one scale per row: a quarter of float32's memory traffic, at the price of some per cent in the logits. Prompts
    still go through the modules as they are."""
    language = getattr(model, "language_model", model)
    _in_int8[language] = wanted
    held = _decoders.pop(language, None)
    if held is not None:
        held.release()


def decoder_of(model: nn.Module) -> Decoder | HostDecoder | None:
    """The model's decoder, renewed where its weights changed; None, and the reason said once, if it can have none."""
    held = _decoders.get(model)
    if held is not None and held.checked:
        return held
    if model in _refused:
        return None
    reason = refusal(model)
    if reason is None and held is not None and held.signature == signature(model):
        held.checked = True
        return held
    if held is not None:
        held.release()
        del _decoders[model]
    if reason is not None:
        _refused[model] = reason
        unusual = not model.training and "not in use" not in reason and model.lm_head.weight.device.type in _KERNELS
        if unusual and _told.get(model) != reason:
            _told[model] = reason
            message = f"decoding runs module by module, several times slower: {reason}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None
    _decoders[model] = _new_decoder(model, _in_int8.get(model, False))
    return _decoders[model]


def _new_decoder(model: nn.Module, int8: bool) -> Decoder | HostDecoder:
    if model.lm_head.weight.device.type == "cuda":
        return Decoder(model, int8=int8)
    from vlmamba.models.decode_cpu import HostDecoder

    layers, head = fused_weights(model, int8)
    return HostDecoder(layers, head, signature(model))


def look_again(model: nn.Module) -> None:
    """After a prompt went through the modules: they are looked at anew before the next fused token."""
    if torch.compiler.is_compiling():
        return
    _refused.pop(model, None)
    held = _decoders.get(model)
    if held is not None:
        held.checked = False


def vouch(model: nn.Module, seen: tuple[tuple[int, int], ...]) -> None:
    """The modules were looked at just now, nothing refuses, and their `signature` is this one."""
    held = _decoders.get(model)
    if held is not None:
        held.checked = held.signature == seen


def hand_over(model: nn.Module, state: MambaState, conv: Sequence[Tensor], ssm: Sequence[Tensor]) -> None:
    """Copies what a prompt left (per layer (B, W-1, D) and (B, D, N)) into `state`: where its memory is, or, for a
    state that has none yet, straight to where the model decodes if that place is free."""
    if state.slots is None:
        held = _decoders.get(model)
        lent = isinstance(held, Decoder) and held.checked and held.lend(state, len(ssm[0]))
        if not lent:
            state.conv, state.ssm = [torch.empty_like(t) for t in conv], [torch.empty_like(t) for t in ssm]
    copy_all(state.conv, conv)
    copy_all(state.ssm, ssm)


def copy_all(targets: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> None:
    """Copies tensors of one dtype to others of one dtype: so it takes a launch or two however many they are."""
    torch._foreach_copy_([t for t in targets if t is not None], [t for t in sources if t is not None])


@torch.no_grad()
def generate_tokens(
    model: nn.Module, input_ids: Tensor, *, max_new_tokens: int, pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None, state: MambaState | None = None, stops: Sequence[int] = (),
    temperature: float = 0.0, seed: int = 0, every: int = 16,
) -> Iterator[Tensor]:  # fmt: skip
    """Reads a prompt (B, L) and yields the tokens that follow, in blocks (B, n) on the CPU: `generate` without its cost
    per token. As fast as the weights can be read where the fused step can run, module by module elsewhere.

    Args:
        model: a causal LM of ours, or a VL-Mamba (then `pixel_values` as in its `forward`), in eval mode.
        state: to continue from; it is moved on, and has read everything but the last token of each row. What it has
            read of a row that ended is open.
        stops: a row that draws one of these has ended; what its row holds after that is to be ignored. Generation ends
            when every row has.
        max_new_tokens: below 1 nothing is read or drawn.
        temperature: 0 takes the likeliest token. every: how many tokens are drawn between two looks at them.
    """
    if max_new_tokens < 1:
        return
    language = getattr(model, "language_model", model)
    known = getattr(model.config, "num_text_tokens", None) or language.lm_head.out_features
    limits = (known, getattr(model.config, "image_token_id", -1))
    state = state or MambaState.empty(len(language.backbone.layers))
    images = {} if pixel_values is None else {"pixel_values": pixel_values}
    if attention_mask is not None:
        attention_mask, input_ids = towards_end(attention_mask, input_ids)
    prompt = {"input_ids": input_ids, "attention_mask": attention_mask, **images}
    output = model(**prompt, cache_params=state, use_cache=True, logits_to_keep=1)
    generator = torch.Generator(input_ids.device).manual_seed(seed)
    token = _draw(output.logits[:, -1], temperature, generator)
    ends = torch.tensor(list(stops), dtype=torch.int64)
    ended = torch.isin(token.cpu(), ends)
    yield token.cpu()[:, None]
    left = max_new_tokens - 1
    decoder = decoder_of(language)
    if isinstance(decoder, Decoder):
        yield from decoder.tokens(
            token, state, left, stops=stops, temperature=temperature, seed=seed, limits=limits, every=every, ended=ended
        )
        return
    while left > 0 and not bool(ended.all()):
        output = model(input_ids=token[:, None], cache_params=state, use_cache=True)
        token = _draw(output.logits[:, -1], temperature, generator)
        ended |= torch.isin(token.cpu(), ends)
        left -= 1
        yield token.cpu()[:, None]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """The likeliest token of each row (B, V), or one drawn."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits.float() / temperature, -1), 1, generator=generator)[:, 0]


def one_token(model: nn.Module, input_ids: Tensor, state: MambaState) -> Tensor | None:
    """Logits (B, 1, V) in the model's dtype after one more token per row (B, 1); None where the plain path must run."""
    kind = input_ids.device.type
    if kind not in _KERNELS or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if input_ids.shape[1] != 1 or state.slots != len(input_ids):
        look_again(model)
        return None
    if torch.is_autocast_enabled(kind) or (kind == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    decoder = decoder_of(model)
    if decoder is None or (kind == "cpu" and len(input_ids) > HOST_ROWS):
        return None
    dtype = model.lm_head.weight.dtype
    return decoder.logits(input_ids[:, 0], state).to(dtype, copy=kind == "cuda").unsqueeze(1)


def signature(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes when a parameter is written to or replaced."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())
