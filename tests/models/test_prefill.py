"""Prompts through buckets and in pieces beside the plain modules: logits, states, and what is handed on."""

from __future__ import annotations

import gc

import pytest
import torch
from test_decode import make, tokens
from torch.testing import assert_close

from vlmamba.models import MambaState, decode, prefill
from vlmamba.models.prefill import Prompt, Reader, bucket_of

EXACT = {"rtol": 1e-4, "atol": 1e-5}


class FakeGraph:
    """Stands for the capture of a CUDA graph: runs the function, but gives out the same memory every time."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, function):
        self.captured += 1
        outputs = tuple(torch.full_like(t, float("nan")) for t in function())

        def replay():
            for held, new in zip(outputs, function()):
                held.copy_(new)
            return outputs

        return replay


@pytest.fixture
def model():
    return make()


@pytest.fixture
def graph() -> FakeGraph:
    return FakeGraph()


def through(model, graph, ids=None, state=None, mask=None, keep=1, embeds=None):
    """Logits through the reader, as `forward` on a GPU would; the state moves on."""
    return prefill._through_reader(model, Prompt.of(ids, embeds, mask, keep), state, graph)


def plain(model, ids, state=None, mask=None):
    """Logits of all positions, through the modules."""
    state = MambaState.empty(3) if state is None else state
    return model.lm_head(model.backbone(ids, mask, cache_params=state).last_hidden_state), state


def same_states(a: MambaState, b: MambaState) -> None:
    for x, y in zip(a.conv + a.ssm, b.conv + b.ssm, strict=True):
        assert_close(x, y, **EXACT)


def test_buckets_hold_their_prompts_and_waste_little():
    for length in range(1, 9000):
        bucket = bucket_of(length)
        assert bucket >= length
        assert bucket_of(bucket) == bucket
        assert bucket % 16 == 0
        if length > 64:
            assert (bucket - length) / bucket < (0.2 if length <= 512 else 0.12), length
    assert [bucket_of(n) for n in (1, 17, 64, 65, 761, 1024, 1025)] == [16, 32, 64, 80, 768, 1024, 1152]


@pytest.mark.parametrize("length", [1, 2, 9, 16, 31])
@torch.no_grad()
def test_bucket_is_the_modules(model, graph, length):
    """First prompts run as they are, later ones as a graph; shorter ones than before leave nothing behind."""
    expected, after = plain(model, tokens(2, length))
    for before in (None, 16, None):
        if before:
            through(model, graph, tokens(2, before, seed=3), MambaState.empty(3))
        state = MambaState.empty(3)
        assert_close(through(model, graph, tokens(2, length), state), expected[:, -1:], **EXACT)
        same_states(state, after)
    assert graph.captured >= 1


@torch.no_grad()
def test_padding_of_a_bucket_is_never_read(model, graph):
    expected, after = plain(model, tokens(2, 9))
    for _ in range(2):
        state = MambaState.empty(3)
        through(model, graph, tokens(2, 9), state)
        prefill._readers[model].bucket(2, 9, True).hidden.fill_(float("nan"))
        assert_close(through(model, graph, tokens(2, 9), state := MambaState.empty(3)), expected[:, -1:], **EXACT)
        same_states(state, after)


@torch.no_grad()
def test_what_a_prompt_gives_outlives_the_next_one(model, graph):
    state = MambaState.empty(3)
    for _ in range(3):
        logits, own = through(model, graph, tokens(2, 9), state := MambaState.empty(3)), state.clone()
    kept = logits.clone()
    through(model, graph, tokens(2, 9, seed=5), MambaState.empty(3))
    assert torch.equal(logits, kept)
    assert all(torch.equal(a, b) for a, b in zip(state.conv + state.ssm, own.conv + own.ssm))


@torch.no_grad()
def test_a_turn_of_a_chat_continues_and_the_next_prompt_starts_anew(model, graph):
    for _ in range(2):
        ours, theirs = MambaState.empty(3), MambaState.empty(3)
        for i, length in enumerate((9, 2, 16)):
            ids = tokens(2, length, seed=i)
            held = list(ours.ssm)
            assert_close(through(model, graph, ids, ours), plain(model, ids, theirs)[0][:, -1:], **EXACT)
            assert i == 0 or all(a is b for a, b in zip(held, ours.ssm))  # in place
        same_states(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([2, 5])])
@pytest.mark.parametrize("pieces", [False, True])
@torch.no_grad()
def test_padding_and_positions(model, graph, side, keep, pieces, monkeypatch):
    """Every kind of padding and of positions asked for, in a bucket and in pieces of four."""
    if pieces:
        monkeypatch.setattr(prefill, "CHUNK", 12)
        monkeypatch.setattr(prefill, "SHORTEST", 4)
    mask = torch.ones(3, 11, dtype=torch.long)
    where = {"left": (slice(0, 3), slice(0, 7)), "right": (slice(9, 11), slice(4, 11)), "inside": (slice(2, 4), [0, 6])}
    for row, gap in enumerate(where[side]):
        mask[row, gap] = 0
    ids = tokens(3, 11)
    expected, after = plain(model, ids, mask=mask)
    expected = expected[:, keep] if isinstance(keep, torch.Tensor) else expected[:, -keep:]
    for _ in range(2):
        state = MambaState.empty(3)
        assert_close(through(model, graph, ids, state, mask, keep), expected, **EXACT)
        embeds = model.backbone.embeddings(ids)
        assert_close(through(model, graph, None, None, mask, keep, embeds), expected, **EXACT)
        same_states(state, after)
    assert (graph.captured > 0) != pieces


@pytest.mark.parametrize("keep", [0, 1, 6])
@pytest.mark.parametrize("start", [0, 5])
@torch.no_grad()
def test_long_prompts_are_read_in_pieces_exactly(model, monkeypatch, keep, start):
    """Through the modules, by `forward` itself: no call sees more than a piece."""
    whole, begun = MambaState.empty(3), MambaState.empty(3)
    for state in (whole, begun):
        if start:
            plain(model, tokens(2, start), state)
    expected, _ = plain(model, tokens(2, 43, seed=1), whole)
    monkeypatch.setattr(prefill, "CHUNK", 20)
    monkeypatch.setattr(prefill, "SHORTEST", 4)
    seen = []
    model.backbone.layers[0].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[1]))
    output = model(tokens(2, 43, seed=1), cache_params=begun, logits_to_keep=keep)
    assert seen == [10, 10, 10, 10, 3]
    assert output.cache_params is begun
    assert_close(output.logits, expected[:, -keep:], **EXACT)
    same_states(begun, whole)
    seen.clear()
    with torch.enable_grad():
        model(tokens(1, 43))
    model(tokens(1, 43), seq_idx=torch.zeros(1, 43, dtype=torch.int32))  # a boundary could fall on a new sequence
    model(tokens(1, 43), output_hidden_states=True)
    assert seen == [43, 43, 43]


@torch.no_grad()
def test_changed_weights_are_read_anew(model, graph):
    ids = tokens(1, 8)
    for _ in range(2):
        through(model, graph, ids)
    reader = prefill._readers[model]
    with torch.no_grad():
        model.backbone.layers[1].mixer.ssm.A_log.add_(0.3)
    state, theirs = MambaState.empty(3), MambaState.empty(3)
    assert_close(through(model, graph, ids, state), plain(model, ids, theirs)[0][:, -1:], **EXACT)
    same_states(state, theirs)
    assert prefill._readers[model] is not reader
    model.backbone.layers[1].mixer.in_proj.weight.data = model.backbone.layers[1].mixer.in_proj.weight.data * 2
    assert_close(through(model, graph, ids), plain(model, ids)[0][:, -1:], **EXACT)


@torch.no_grad()
def test_hooks_go_through_the_modules_and_it_is_said_once(model, graph, recwarn):
    ids = tokens(1, 8)
    through(model, graph, ids)
    model.backbone.layers[0].mixer.register_forward_hook(lambda *_: None)
    assert [through(model, graph, ids) for _ in range(2)] == [None, None]
    (said,) = recwarn
    assert "without fused kernels and graphs: backbone.layers.0.mixer has hooks" in str(said.message)
    assert model not in prefill._readers


@torch.no_grad()
def test_buckets_used_lately_are_kept(model, graph, monkeypatch):
    monkeypatch.setattr(prefill, "KEPT", 2)
    for length in (16, 32, 16, 48, 16):
        through(model, graph, tokens(1, length))
    assert [key[1] for key in prefill._readers[model].buckets] == [48, 16]
    assert graph.captured == 1  # of 16: the others came once


@torch.no_grad()
def test_large_prompts_and_many_rows_take_no_bucket(model, graph, monkeypatch):
    monkeypatch.setattr(prefill, "CHUNK", 64)
    for shape in ((prefill.ROWS + 1, 3), (3, 30)):
        for _ in range(2):
            state, theirs = MambaState.empty(3), MambaState.empty(3)
            expected, _ = plain(model, tokens(*shape), theirs)
            assert_close(through(model, graph, tokens(*shape), state), expected[:, -1:], **EXACT)
            same_states(state, theirs)
    assert not prefill._readers[model].buckets


@torch.no_grad()
def test_the_state_goes_straight_to_where_the_model_decodes(model, graph):
    """A new state's memory is the lane's, unless another one lives there; the next token does not copy it."""
    decoder = decode.Decoder(model, capture=False, implementation="reference")
    decode._decoders[model] = decoder
    lane, ids = decoder.lane(2), tokens(2, 6)
    through(model, graph, ids)
    first, second = MambaState.empty(3), MambaState.empty(3)
    for state in (first, second):
        through(model, graph, ids, state)
    assert lane.holds(first)
    assert not lane.holds(second)
    theirs = MambaState.empty(3)
    plain(model, ids, theirs)
    after = tokens(2, 1, seed=4)
    expected = plain(model, after, theirs)[0][:, 0]
    assert_close(decoder.logits(after[:, 0], first), expected, **EXACT)
    assert_close(decoder.logits(after[:, 0], second), expected, **EXACT)  # pushes the first one out
    same_states(first, theirs)
    through(model, graph, ids, second)  # the next turn, in place
    assert lane.holds(second)
    plain(model, ids, theirs)
    same_states(second, theirs)


@torch.no_grad()
def test_a_residual_stream_in_the_dtype_of_the_model(graph):
    for wide in (True, False):
        model = make(dtype=torch.bfloat16, residual_in_fp32=wide)
        ids, reader = tokens(2, 16), Reader(model, graph)
        assert reader.weights.stream == (torch.float32 if wide else torch.bfloat16)
        result = reader.read(Prompt.of(ids, None, None, 0), None)
        assert result is not None
        assert torch.equal(result[0], plain(model, ids)[0])


# On a GPU: `forward` and `generate` themselves.


@pytest.fixture
def on_gpu():
    return make("cuda", torch.bfloat16, hidden_size=64, num_hidden_layers=3, state_size=16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 64), (2, 192), (8, 16)])
@torch.no_grad()
def test_full_buckets_on_the_gpu_equal_the_modules(on_gpu, shape):
    """The same kernels on the same shapes: logits and states bit for bit, before and after the capture."""
    ids = tokens(*shape).cuda()
    expected, after = plain(on_gpu, ids)
    for _ in range(3):
        output = on_gpu(ids, logits_to_keep=1, use_cache=True)
        assert torch.equal(output.logits, on_gpu.lm_head(on_gpu.backbone(ids).last_hidden_state[:, -1:]))
        assert all(
            torch.equal(a, b)
            for a, b in zip(output.cache_params.conv + output.cache_params.ssm, after.conv + after.ssm)
        )
    assert_close(output.logits, expected[:, -1:], rtol=3e-2, atol=3e-2)
    assert all(bucket._replay is not None for bucket in prefill._readers[on_gpu].buckets.values())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 77), (9, 20)])
@torch.no_grad()
def test_prompts_on_the_gpu_are_as_exact_as_the_modules(on_gpu, shape):
    """Against float64 no further off than the modules, from a state too, with padding before the text."""
    exact = make(hidden_size=64, num_hidden_layers=3, state_size=16)
    exact.load_state_dict(on_gpu.state_dict())
    exact = exact.double().cuda()
    first, mask = tokens(shape[0], 33, seed=8).cuda(), torch.ones(shape[0], 33, dtype=torch.long, device="cuda")
    mask[0, :7] = 0
    second = tokens(shape[0], max(shape[1], 2), seed=1).cuda()
    for _ in range(3):
        state = on_gpu(first, attention_mask=mask, use_cache=True, logits_to_keep=1).cache_params
        ours = on_gpu(second, cache_params=state, logits_to_keep=1).logits[:, 0]
    states = [MambaState.empty(3), MambaState.empty(3)]
    for m, s in zip((on_gpu, exact), states):
        plain(m, first, s, mask)
    theirs, right = (plain(m, second, s)[0][:, -1] for m, s in zip((on_gpu, exact), states))
    assert (ours.double() - right).norm() <= 2 * (theirs.double() - right).norm()
    for a, b, c in zip(state.ssm, states[0].ssm, states[1].ssm):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-6


@pytest.mark.gpu
@torch.no_grad()
def test_changed_weights_and_a_small_number_of_buckets_on_the_gpu(on_gpu, monkeypatch):
    monkeypatch.setattr(prefill, "KEPT", 2)
    for length in (16, 16, 32, 32, 48, 48, 16, 16, 48, 32):
        ids = tokens(2, length, seed=length).cuda()
        if length == 48:
            on_gpu.backbone.layers[1].mixer.ssm.A_log.add_(0.01)
        expected = on_gpu.lm_head(on_gpu.backbone(ids).last_hidden_state[:, -1:])
        assert torch.equal(on_gpu(ids, logits_to_keep=1).logits, expected)
    assert len(prefill._readers[on_gpu].buckets) <= 2


@pytest.mark.gpu
@torch.no_grad()
def test_long_prompts_on_the_gpu_take_the_memory_of_a_piece(on_gpu):
    """Four times the length, hardly more memory; the same logits and state as in smaller pieces, to rounding."""
    peaks = []
    for length in (3 * prefill.CHUNK, 12 * prefill.CHUNK):
        ids = tokens(1, length).cuda()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        on_gpu(ids, use_cache=True, logits_to_keep=1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 1.1 * peaks[0] + 2**20


@pytest.mark.gpu
@torch.no_grad()
def test_generate_reads_through_buckets_and_decodes_from_them(on_gpu):
    """The answer is that of prompts read by the modules, and the state lies where decoding wants it."""
    ids = tokens(2, 21).cuda()
    greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "suppress_tokens": [0, 1]}
    answers = [on_gpu.generate(ids, **greedy) for _ in range(3)]
    assert all(torch.equal(a, answers[0]) for a in answers)
    state = MambaState.empty(3)
    gc.collect()  # the states of the answers are gone
    first = on_gpu(ids, cache_params=state, logits_to_keep=1).logits[:, 0, 2:].argmax(-1) + 2
    assert decode._decoders[on_gpu].lane(2).holds(state)
    assert torch.equal(first, answers[0][:, 21])
