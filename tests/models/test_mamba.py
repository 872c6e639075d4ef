"""The Mamba language model: against transformers' own, and the identities of a recurrence."""

from __future__ import annotations

import pytest
import torch
from test_decode import config, tokens
from torch.testing import assert_close
from transformers import MambaForCausalLM as TransformersMamba

from vlmamba.models import MambaState, VLMambaForCausalLM
from vlmamba.models.decode import generate_tokens
from vlmamba.models.names import to_runtime


@pytest.fixture
def pair() -> tuple[TransformersMamba, VLMambaForCausalLM]:
    """transformers' model with random weights and ours with the same ones, through our renaming."""
    torch.manual_seed(0)
    theirs = TransformersMamba(config()).eval()
    for name, p in theirs.named_parameters():
        if name.endswith(("conv1d.bias", "norm.weight", "D")):
            torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    ours = VLMambaForCausalLM(config()).eval()
    ours.load_state_dict({to_runtime(k): v for k, v in theirs.state_dict().items()})
    return theirs, ours


@pytest.fixture
def model() -> VLMambaForCausalLM:
    torch.manual_seed(1)
    return VLMambaForCausalLM(config()).eval()


@pytest.mark.parametrize("length", [1, 5, 63])
@torch.no_grad()
def test_logits_equal_transformers(pair, length):
    theirs, ours = pair
    ids = tokens(2, length)
    assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_equal_transformers_in_fp64(pair):
    """To rounding, but for what transformers itself computes in float32."""
    theirs, ours = (m.double() for m in pair)
    ids = tokens(2, 33)
    assert_close(ours(ids).logits.float(), theirs(ids).logits, rtol=1e-6, atol=1e-6)


def test_gradients_equal_transformers(pair):
    theirs, ours = pair
    ids = tokens(2, 19)
    theirs(ids, labels=ids).loss.backward()
    ours(ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in ours.named_parameters()}
    for name, p in theirs.named_parameters():
        assert_close(grads[to_runtime(name)], p.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_saved_names_are_those_of_transformers(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ids = tokens(1, 9)
    back, info = TransformersMamba.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert_close(back.eval()(ids).logits, theirs(ids).logits)
        again, info = VLMambaForCausalLM.from_pretrained(tmp_path / "theirs", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_close(again.eval()(ids).logits, ours(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 12])
@torch.no_grad()
def test_continuation_with_any_number_of_tokens_is_exact(model, cut):
    ids = tokens(2, 13)
    whole = model(ids)
    first = model(ids[:, :cut], use_cache=True)
    second = model(ids[:, cut:], cache_params=first.cache_params)
    assert_close(torch.cat([first.logits, second.logits], 1), whole.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_single_steps_equal_one_pass(model):
    ids = tokens(2, 11)
    state = MambaState.empty(model.config.num_hidden_layers)
    steps = [model(ids[:, t : t + 1], cache_params=state).logits for t in range(ids.shape[1])]
    whole = model(ids, use_cache=True)
    assert_close(torch.cat(steps, 1), whole.logits, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(state.ssm + state.conv, whole.cache_params.ssm + whole.cache_params.conv, strict=True):
        assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right", "interior"])
@pytest.mark.parametrize("continued", [False, True])
@torch.no_grad()
def test_padded_batch_equals_single_sequences(model, side, continued):
    lengths, width = (3, 9, 0, 6), 9
    ids, mask = torch.full((4, width), 5), torch.zeros(4, width, dtype=torch.long)
    rows = [tokens(1, n, seed=n) for n in lengths]
    for b, n in enumerate(lengths):
        if side == "interior":
            places = torch.randperm(width, generator=torch.Generator().manual_seed(b))[:n].sort().values
        else:
            places = torch.arange(n) + (width - n if side == "left" else 0)
        ids[b, places], mask[b, places] = rows[b][0], 1
    context = tokens(4, 7, seed=99)
    state = model(context, use_cache=True).cache_params if continued else None
    batch = model(ids, attention_mask=mask, cache_params=state.clone() if state else None, use_cache=True)
    for b, n in enumerate(lengths):
        own = state.gather(torch.tensor([b])) if state else None
        if n == 0:
            expected = own.ssm[0] if own else torch.zeros_like(batch.cache_params.ssm[0][:1])
            assert_close(batch.cache_params.ssm[0][b : b + 1], expected, rtol=0, atol=0)
            continue
        single = model(rows[b], cache_params=own, use_cache=True)
        assert_close(batch.logits[b, mask[b] == 1], single.logits[0], rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(batch.cache_params.ssm, single.cache_params.ssm, strict=True):
            assert_close(mine[b], theirs[0], rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(batch.cache_params.conv, single.cache_params.conv, strict=True):
            assert_close(mine[b], theirs[0], rtol=1e-5, atol=1e-6)


def test_packed_sequences_equal_separate_ones(model):
    model.train()
    parts = [tokens(1, n, seed=n) for n in (4, 1, 9, 3)]
    packed = torch.cat(parts, 1)
    seq_idx = torch.cat([torch.full((1, p.shape[1]), i, dtype=torch.int32) for i, p in enumerate(parts)], 1)
    loss = model(packed, labels=packed, seq_idx=seq_idx, num_items_in_batch=1).loss
    loss.backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    total = sum(model(p, labels=p, num_items_in_batch=1).loss for p in parts)
    total.backward()
    assert_close(loss, total, rtol=1e-6, atol=1e-5)
    for name, p in model.named_parameters():
        assert_close(together[name], p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 1, 1, 1]])
def test_padding_has_no_part_in_the_loss(model, mask):
    """Wherever it stands, and whatever its labels are."""
    model.train()
    row, mask = tokens(1, 5), torch.tensor([mask])
    padded = tokens(1, 8, seed=1).masked_scatter(mask == 1, row)
    alone, loss = model(row, labels=row).loss, model(padded, attention_mask=mask, labels=padded).loss
    assert_close(loss, alone, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(*(torch.autograd.grad(of, list(model.parameters())) for of in (loss, alone)), strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_state_is_not_computed_again(model):
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(tokens(1, 4), labels=tokens(1, 4), use_cache=True)
    model.eval()
    model(tokens(1, 4), use_cache=True)


def test_checkpointing_changes_nothing(model):
    model.train()
    ids = tokens(2, 12)
    plain = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    model.gradient_checkpointing_enable()
    again = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    for a, b in zip(plain, again, strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_ssm_parameters_stay_float32(model, tmp_path):
    model.to(torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if ".ssm." in n} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = VLMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in again.named_parameters():
        assert p.dtype == (torch.float32 if ".ssm." in name else torch.bfloat16), name
        assert_close(p, model.get_parameter(name), rtol=0, atol=0)


def test_dt_bias_is_initialised_in_range(model):
    for block in model.backbone.layers:
        dt = torch.nn.functional.softplus(block.mixer.ssm.dt_bias)
        assert dt.min() >= 1e-4
        assert dt.max() <= 0.1 + 1e-6
        assert dt.std() > 0.005


@pytest.mark.parametrize("side", ["left", "right", "both"])
@torch.no_grad()
def test_generate_batched_padded_equals_single(model, side, monkeypatch):
    monkeypatch.setattr("transformers.generation.utils.logger.warning", pytest.fail)  # it warns of padding at the end
    prompts = [tokens(1, n, seed=n) for n in (4, 9, 1)]
    ids, mask = torch.zeros(3, 10, dtype=torch.long), torch.zeros(3, 10, dtype=torch.long)
    for b, p in enumerate(prompts):
        n = p.shape[1]
        start = {"left": 10 - n, "right": 0, "both": (10 - n) // 2}[side]
        ids[b, start : start + n], mask[b, start : start + n] = p[0], 1
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=mask, **options)
    loop = torch.cat(list(generate_tokens(model, ids, attention_mask=mask, max_new_tokens=5)), 1)
    assert torch.equal(batch[:, :10], ids)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **options), batch[:, 10:])
    for b, p in enumerate(prompts):
        single = model.generate(p, **options)
        assert batch[b, 10:].tolist() == single[0, p.shape[1] :].tolist()
        assert loop[b].tolist() == torch.cat(list(generate_tokens(model, p, max_new_tokens=5)), 1)[0].tolist()


@torch.no_grad()
def test_generate_continues_from_a_state(model):
    ids = tokens(1, 10)
    whole = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    state = model(ids[:, :6], use_cache=True).cache_params
    more, mask = torch.nn.functional.pad(ids[:, 6:], (0, 2)), (torch.arange(12) < 10).long()[None]
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for given in ({"input_ids": more, "attention_mask": mask}, {"input_ids": ids[:, 6:]}):
        rest = model.generate(**given, cache_params=state.clone(), **options)
        assert rest[0, -8:].tolist() == whole[0, 10:].tolist()


@torch.no_grad()
def test_beams_equal_transformers(pair):
    theirs, ours = pair
    ids = tokens(2, 6)
    options = {"max_new_tokens": 7, "num_beams": 3, "do_sample": False, "num_return_sequences": 2, "eos_token_id": 1}
    assert ours.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()


@torch.no_grad()
def test_what_generate_returns_beside_the_tokens_is_transformers(pair):
    ids = tokens(2, 6)
    flags = dict.fromkeys(("return_dict_in_generate", "output_hidden_states", "output_scores", "output_logits"), True)
    theirs, ours = (model.generate(ids, max_new_tokens=4, do_sample=False, **flags) for model in pair)
    assert theirs.keys() == ours.keys()
    for name in ("scores", "logits", "hidden_states"):
        assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="output_attentions=True: this language model has no attention"):
        pair[1].generate(ids, max_new_tokens=4, return_dict_in_generate=True, output_attentions=True)


@torch.no_grad()
def test_state_saves_and_branches(model, tmp_path):
    state = model(tokens(3, 5), use_cache=True).cache_params
    state.save(tmp_path / "state.safetensors")
    again = MambaState.load(tmp_path / "state.safetensors")
    for a, b in zip(state.conv + state.ssm, again.conv + again.ssm, strict=True):
        assert_close(a, b, rtol=0, atol=0)
    branch = state.clone()
    model(tokens(3, 2), cache_params=branch)
    assert not torch.equal(branch.ssm[0], state.ssm[0])
    chosen = state.gather(torch.tensor([2, 0, 2, 1]))
    assert_close(chosen.ssm[2][2], state.ssm[2][2], rtol=0, atol=0)
    assert_close(chosen.conv[1][1], state.conv[1][0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="holds 3 sequences, the input 2"):
        model(tokens(2, 2), cache_params=state)


@torch.no_grad()
def test_no_state_is_kept_unasked(model):
    out = model(tokens(1, 4), use_cache=False)
    assert out.cache_params is None
