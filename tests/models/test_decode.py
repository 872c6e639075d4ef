"""The fused step beside the plain modules: logits, states, interleaved generations, and when it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import MambaConfig

from vlmamba.models import MambaState, VLMambaForCausalLM, decode
from vlmamba.models.decode import Decoder, generate_tokens, structure_refusal

SIZES = {"vocab_size": 67, "hidden_size": 24, "num_hidden_layers": 3, "state_size": 8, "time_step_rank": 5}


def config(**options) -> MambaConfig:
    return MambaConfig(pad_token_id=0, eos_token_id=1, **(SIZES | options))


def make(device: str = "cpu", dtype: torch.dtype = torch.float32, **options) -> VLMambaForCausalLM:
    torch.manual_seed(1)
    model = VLMambaForCausalLM(config(**options)).eval()
    for name, p in model.named_parameters():
        if name.endswith(("conv1d.bias", "norm.weight", "D")):
            nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    return model.to(device, dtype)


@pytest.fixture
def model() -> VLMambaForCausalLM:
    return make()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 67, shape, generator=torch.Generator().manual_seed(seed))


def plain(model: VLMambaForCausalLM, ids: torch.Tensor, state: MambaState) -> torch.Tensor:
    """Logits (B, V) of the last position, through the modules."""
    hidden = model.backbone(ids, cache_params=state, use_cache=True).last_hidden_state
    return model.lm_head(hidden[:, -1])


def reference_decoder(model: nn.Module) -> Decoder:
    return Decoder(model, capture=False, implementation="reference")


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_step_is_the_modules(model, batch):
    """Tokens through the fused step and through the modules: the same logits, the same states."""
    theirs, ours = MambaState.empty(3), MambaState.empty(3)
    for state in (theirs, ours):
        plain(model, tokens(batch, 6), state)
    decoder = reference_decoder(model)
    for i in range(3):
        ids = tokens(batch, 1, seed=i)
        assert_close(decoder.logits(ids[:, 0], ours), plain(model, ids, theirs), rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.conv + ours.ssm, theirs.conv + theirs.ssm):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_interleaved_generations_do_not_mix(model):
    decoder = reference_decoder(model)
    states, expected = [MambaState.empty(3) for _ in range(2)], [MambaState.empty(3) for _ in range(2)]
    for i in range(2):
        plain(model, tokens(2, 4, seed=i), states[i])
        plain(model, tokens(2, 4, seed=i), expected[i])
    for i in (0, 1, 1, 0, 1):
        ids = tokens(2, 1, seed=5 + i)
        assert_close(decoder.logits(ids[:, 0], states[i]), plain(model, ids, expected[i]), rtol=1e-4, atol=1e-5)
    ids = tokens(2, 3, seed=9)
    for i in range(2):  # whether it lives in the pool or was pushed out, a state can be read on by the modules
        assert_close(plain(model, ids, states[i]), plain(model, ids, expected[i]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_interleaved_streams_do_not_mix(model):
    """Two that take turns, whatever they stop at, and a narrower one that is left while another goes on."""

    def begin(decoder: Decoder, rows: int, seed: int, stop: int = -1):
        state, ids = MambaState.empty(3), tokens(rows, 5, seed=seed)
        first = plain(model, ids, state).argmax(-1)
        return decoder.tokens(first, state, 13, stops=[stop], every=4, temperature=1.0, seed=2**60 + seed)

    def alone(rows: int, seed: int, stop: int = -1) -> torch.Tensor:
        return torch.cat(list(begin(reference_decoder(model), rows, seed, stop)), 1)

    decoder = reference_decoder(model)
    stop = int(alone(2, 1)[0, 1])  # so that row 0 has ended when the others go on
    streams = [begin(decoder, 2, 1, stop), begin(decoder, 2, 2)]
    first, second = (torch.cat(blocks, 1) for blocks in zip(*[(next(streams[0]), next(streams[1])) for _ in range(3)]))
    assert torch.equal(first[0, :2], alone(2, 1)[0, :2])
    assert torch.equal(first[1], alone(2, 1, stop)[1, :12])
    assert torch.equal(second, alone(2, 2)[:, :12])

    narrow, wide = begin(decoder, 3, 3), begin(decoder, 4, 4)
    blocks = [next(narrow), next(wide), next(wide)][1:]
    narrow.close()
    assert torch.equal(torch.cat([*blocks, *wide], 1), alone(4, 4))


@torch.no_grad()
def test_lanes_are_few(model):
    """Batches of many sizes do not add up; a state whose lane went is whole and can be read on."""
    decoder, state, expected = reference_decoder(model), MambaState.empty(3), MambaState.empty(3)
    for each in (state, expected):
        plain(model, tokens(1, 4), each)
    assert_close(decoder.logits(tokens(1), state), plain(model, tokens(1, 1), expected), rtol=1e-4, atol=1e-5)
    first = decoder.lane(1)
    for batch in (2, 3, 5, 9):
        decoder.lane(batch)
    assert len(decoder._lanes) == decode.LANES
    assert not first.holds(state)
    assert_close(decoder.logits(tokens(1), state), plain(model, tokens(1, 1), expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_reordered_state_is_taken_in_again(model):
    decoder, ours, theirs = reference_decoder(model), MambaState.empty(3), MambaState.empty(3)
    for state in (ours, theirs):
        plain(model, tokens(2, 4), state)
    decoder.logits(tokens(2, 1)[:, 0], ours)
    plain(model, tokens(2, 1), theirs)
    for state in (ours, theirs):
        state.reorder_cache(torch.tensor([1, 1]))
    assert_close(decoder.logits(tokens(2, 1)[:, 0], ours), plain(model, tokens(2, 1), theirs), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_token_loop_is_greedy_and_stops(model):
    """The loop's tokens are the greedy ones; a row's state has read everything before its end, and nothing after."""
    start, state = tokens(2, 4), MambaState.empty(3)
    token = plain(model, start, state).argmax(-1)
    greedy, reading = [], MambaState.empty(3)
    plain(model, start, reading)
    for _ in range(9):
        greedy.append(plain(model, (greedy[-1] if greedy else token)[:, None], reading).argmax(-1))
    greedy = torch.stack(greedy, 1)
    decoder = reference_decoder(model)
    begun = state.clone()
    blocks = list(decoder.tokens(token, begun, 9, every=4))
    assert [b.shape[1] for b in blocks] == [4, 4, 1]
    assert torch.equal(torch.cat(blocks, 1), greedy)

    end = int(greedy[0, 2])
    when = [row.tolist().index(end) if end in row.tolist() else None for row in greedy]
    begun = state.clone()
    drawn = torch.cat(list(decoder.tokens(token, begun, 9, stops=[end], every=4)), 1)
    for b in range(2):
        until = 9 if when[b] is None else when[b] + 1
        assert torch.equal(drawn[b, :until], greedy[b, :until])
        own = state.gather(torch.tensor([b]))
        fed = torch.cat([token[b : b + 1], greedy[b, : until - 1]])[None]
        plain(model, fed[:, : drawn.shape[1]], own)
        assert_close(begun.gather(torch.tensor([b])).ssm[1], own.ssm[1], rtol=1e-4, atol=1e-5)


def test_a_row_that_ends_at_once_keeps_the_others_in_the_loop(model, monkeypatch):
    """A first token that is an end: the other rows go on as if alone in the token loop; its own state stays."""
    ids = tokens(3, 5)
    monkeypatch.setattr(decode, "decoder_of", lambda _: None)
    alone = torch.cat(list(generate_tokens(model, ids, max_new_tokens=6)), 1)
    end = int(alone[0, 0])
    assert end not in alone[1:, 0]

    decoder, calls = reference_decoder(model), []
    loop = decoder.tokens
    monkeypatch.setattr(decode, "decoder_of", lambda _: decoder)
    monkeypatch.setattr(decoder, "tokens", lambda *given, **options: calls.append(1) or loop(*given, **options))
    state, before = MambaState.empty(3), MambaState.empty(3)
    plain(model, ids, before)
    drawn = torch.cat(list(generate_tokens(model, ids, max_new_tokens=6, state=state, stops=[end])), 1)
    assert calls == [1]
    for row, own in zip(drawn[1:].tolist(), alone[1:].tolist()):
        until = own.index(end) + 1 if end in own else len(row)
        assert row[:until] == own[:until]
    assert_close(state.ssm[1][0], before.ssm[1][0], rtol=1e-4, atol=1e-5)
    calls.clear()
    assert len(list(generate_tokens(model, ids[:1], max_new_tokens=6, stops=[end]))) == 1


def test_generate_tokens_without_the_fused_step(model):
    """On a CPU the loop goes through `forward`, and its tokens are those of `generate`."""
    ids = tokens(2, 5)
    drawn = torch.cat(list(generate_tokens(model, ids, max_new_tokens=6)), 1)
    assert torch.equal(drawn, model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, 5:])


def test_no_tokens_where_none_are_asked_for(model):
    state = MambaState.empty(3)
    assert not list(generate_tokens(model, tokens(2, 5), max_new_tokens=0, state=state))
    assert state.slots is None


def test_refusals_name_what_stands_in_the_way(model):
    assert structure_refusal(model) is None
    assert "is on meta" in decode.refusal(make("meta"))
    mixer = model.backbone.layers[1].mixer
    plain_projection = mixer.x_proj
    mixer.x_proj = type("Adapted", (nn.Linear,), {})(48, 21, bias=False)
    assert "layers.1.mixer.x_proj is a Adapted" in structure_refusal(model)
    mixer.x_proj = plain_projection
    handle = mixer.register_forward_hook(lambda *_: None)
    assert "layers.1.mixer has hooks" in structure_refusal(model)
    handle.remove()
    model.backbone.norm_f.weight.data = model.backbone.norm_f.weight.data.bfloat16()
    assert "norm_f.weight is torch.bfloat16" in structure_refusal(model)
    assert "in_proj has a bias" in structure_refusal(make(use_bias=True))
    assert "no power of two" in structure_refusal(make(state_size=6))


def test_weights_that_change_are_seen(model):
    before = decode.signature(model)
    with torch.no_grad():
        model.backbone.layers[0].mixer.ssm.A_log.add_(0.1)
    assert decode.signature(model) != before


# On a GPU: the captured graph behind `forward` and `generate`.


@pytest.fixture
def on_gpu() -> VLMambaForCausalLM:
    return make("cuda", torch.bfloat16, hidden_size=64, num_hidden_layers=2, state_size=16)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 40, 130])
@torch.no_grad()
def test_graph_is_as_exact_as_the_modules(on_gpu, batch):
    """Against float64 no further off than the modules in bf16, at every kind of plan; and twice the same."""
    model, exact = on_gpu, make(hidden_size=64, num_hidden_layers=2, state_size=16)
    exact.load_state_dict(model.state_dict())
    exact = exact.double().cuda()
    ids = tokens(batch, 9).cuda()
    states = [MambaState.empty(2) for _ in range(4)]
    for i, state in enumerate(states):
        plain(exact if i == 3 else model, ids[:, :5], state)
    fused, again = ([decode.one_token(model, ids[:, i : i + 1], s)[:, 0] for i in range(5, 9)] for s in states[:2])
    modules = [plain(model, ids[:, i : i + 1], states[2]) for i in range(5, 9)]
    exacts = [plain(exact, ids[:, i : i + 1], states[3]) for i in range(5, 9)]
    assert all(torch.equal(a, b) for a, b in zip(fused, again))
    ours, theirs = (torch.stack(x).double() - torch.stack(exacts) for x in (fused, modules))
    assert ours.norm() <= 1.2 * theirs.norm()


@pytest.mark.gpu
def test_generate_uses_the_graph_and_says_when_it_does_not(on_gpu, recwarn):
    ids = tokens(2, 5).cuda()
    drawn = on_gpu.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)[:, 5:]
    assert decode._decoders[on_gpu].checked
    loop = torch.cat(list(generate_tokens(on_gpu, ids, max_new_tokens=12)), 1)
    assert (loop == drawn.cpu()).float().mean() > 0.9  # equal but where two logits tie in bf16
    on_gpu.backbone.layers[0].mixer.register_forward_hook(lambda *_: None)
    for _ in range(2):
        on_gpu.generate(ids, max_new_tokens=3, do_sample=False)
    assert on_gpu not in decode._decoders
    assert len([w for w in recwarn if "module by module" in str(w.message)]) == 1


@pytest.mark.gpu
@torch.no_grad()
def test_changed_weights_make_a_new_graph(on_gpu):
    ids, state = tokens(1, 6).cuda(), MambaState.empty(2)
    plain(on_gpu, ids, state)
    decode.one_token(on_gpu, ids[:, :1], state)
    on_gpu.lm_head.weight.mul_(2)
    states = [MambaState.empty(2), MambaState.empty(2)]
    on_gpu(ids, cache_params=states[0], use_cache=True)
    plain(on_gpu, ids, states[1])
    fused = decode.one_token(on_gpu, ids[:, :1], states[0])[:, 0]
    assert_close(fused, plain(on_gpu, ids[:, :1], states[1]), rtol=3e-2, atol=3e-2)
