"""The native step on the CPU beside the plain modules: logits, states, batches, odd sizes, threads, when it is used."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from test_decode import SIZES, config, make, plain, tokens
from torch import nn
from torch.testing import assert_close
from transformers import SiglipVisionConfig

from vlmamba import VLMambaConfig, VLMambaForConditionalGeneration, ops
from vlmamba.models import MambaState, VLMambaForCausalLM, decode
from vlmamba.ops import native

pytestmark = pytest.mark.skipif(native.refusal() is not None, reason=str(native.refusal()))


@pytest.fixture
def model() -> VLMambaForCausalLM:
    return make()


def begun(model: VLMambaForCausalLM, batch: int) -> MambaState:
    state = MambaState.empty(len(model.backbone.layers))
    plain(model, tokens(batch, 5, seed=9), state)
    return state


def decoder(model: nn.Module, int8: bool = False, threads: int | None = 2):
    from vlmamba.models.decode_cpu import HostDecoder

    return HostDecoder(*decode.fused_weights(model, int8), threads=threads)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (1, {}),
        (3, {}),
        (8, {"hidden_size": 40, "state_size": 16}),
        (1, {"hidden_size": 37, "expand": 3, "vocab_size": 1001, "conv_kernel": 2, "time_step_rank": 1}),
        (2, {"hidden_size": 112, "expand": 1, "use_conv_bias": False, "time_step_rank": 33}),
    ],
)
@torch.no_grad()
def test_twenty_steps_are_the_modules(batch, options):
    """Logits and states, by two threads and by one, which agree to the last bit."""
    model = make(**options)
    theirs, *ours = (begun(model, batch) for _ in range(3))
    fused = [decoder(model, threads=threads) for threads in (1, 2)]
    for i in range(20):
        ids = tokens(batch, 1, seed=i)
        expected = plain(model, ids, theirs)
        alone, together = (f.logits(ids[:, 0], state) for f, state in zip(fused, ours))
        assert torch.equal(alone, together)
        assert error(alone, expected) < 5e-6
    for a, b in zip(ours[1].conv + ours[1].ssm, theirs.conv + theirs.ssm):
        assert error(a, b) < 5e-6


@pytest.mark.parametrize("lanes", [4, 8])
@torch.no_grad()
def test_narrower_hosts(lanes, monkeypatch):
    """The code for hosts with shorter vectors, run on this one."""
    from vlmamba.ops.decode import cpu

    narrow = SimpleNamespace(host=lambda: native.Host("narrow", lanes, False), Kernel=native.Kernel)
    monkeypatch.setattr(cpu, "native", narrow)  # for the step alone: the modules keep the code they have
    for window, int8 in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        cpu._compiled.cache_clear()
        model = make(dtype=window, hidden_size=41)
        fused, ours, theirs = decoder(model, int8), begun(model, 2), begun(model, 2)
        bound = 0.05 if int8 or window == torch.bfloat16 else 5e-6
        for i in range(4):
            ids = tokens(2, 1, seed=i)
            assert error(fused.logits(ids[:, 0], ours), plain(model, ids, theirs)) < bound
    cpu._compiled.cache_clear()


@torch.no_grad()
def test_states_pass_between_step_and_modules(model):
    """Modules, step, modules over several tokens, step, on a reordered state: as the modules alone."""
    fused, ours, theirs = decoder(model), begun(model, 2), begun(model, 2)
    for round_ in range(2):
        for i in range(3):
            ids = tokens(2, 1, seed=i)
            assert error(fused.logits(ids[:, 0], ours), plain(model, ids, theirs)) < 5e-6
        ids = tokens(2, 4, seed=20 + round_)
        assert error(plain(model, ids, ours), plain(model, ids, theirs)) < 5e-6
        for state in (ours, theirs):
            state.reorder_cache(torch.tensor([1, 1]))
    assert all(t.is_contiguous() for t in ours.conv)


@torch.no_grad()
def test_bfloat16_is_no_further_from_the_truth_than_the_modules():
    model = make(dtype=torch.bfloat16, hidden_size=64, state_size=16)
    exact = make(hidden_size=64, state_size=16)
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    ours, theirs, truth = begun(model, 2), begun(model, 2), begun(exact, 2)
    fused, errors = decoder(model), torch.zeros(2)
    for i in range(8):
        ids = tokens(2, 1, seed=i)
        expected = plain(exact, ids, truth)
        errors += torch.tensor(
            [error(fused.logits(ids[:, 0], ours), expected), error(plain(model, ids, theirs), expected)]
        )
    assert 0 < errors[0] < 1.1 * errors[1]
    assert ours.conv[0].dtype == torch.bfloat16


@torch.no_grad()
def test_int8_is_the_modules_with_rounded_weights():
    """Against modules whose large matrices hold what int8 holds."""
    model, rounded = make(hidden_size=64), make(hidden_size=64, tie_word_embeddings=False)
    rounded.load_state_dict(model.state_dict() | {"lm_head.weight": model.lm_head.weight})
    for name, p in rounded.named_parameters():
        if name.endswith(("in_proj.weight", "out_proj.weight", "lm_head.weight")):
            scale = p.abs().amax(1, keepdim=True) / 127
            p.copy_(torch.round(p / scale) * scale)
    ours, theirs = begun(rounded, 2), begun(rounded, 2)
    fused = decoder(model, int8=True)
    for i in range(5):
        ids = tokens(2, 1, seed=i)
        assert error(fused.logits(ids[:, 0], ours), plain(rounded, ids, theirs)) < 5e-6


@torch.no_grad()
def test_float32_weights_that_are_bfloat16_numbers_lose_nothing():
    from vlmamba.ops.decode import cpu

    model = make()
    layers, head = cpu.compact(*decode.fused_weights(model))
    assert head.matrix.weight.dtype == torch.float32
    for p in model.parameters():
        p.copy_(p.bfloat16())
    layers, head = cpu.compact(*decode.fused_weights(model))
    assert {head.matrix.weight.dtype, layers[1].in_proj.weight.dtype, layers[2].dt_proj.dtype} == {torch.bfloat16}
    fused, ours, theirs = decoder(model), begun(model, 1), begun(model, 1)
    for i in range(5):
        ids = tokens(1, 1, seed=i)
        assert error(fused.logits(ids[:, 0], ours), plain(model, ids, theirs)) < 5e-6


@torch.no_grad()
def test_nan_stays_in_its_sequence(model):
    """NaN in one sequence stays in it."""
    fused, state = decoder(model), begun(model, 2)
    clean = state.clone()
    state.ssm[1][0] = float("nan")
    ids = tokens(2, 1)[:, 0]
    found, expected = fused.logits(ids, state), fused.logits(ids, clean)
    assert found[0].isnan().all()
    assert torch.equal(found[1], expected[1])


@torch.no_grad()
def test_callers_at_the_same_time(model):
    """Several threads with a state each, one decoder."""
    fused, expected = decoder(model), []
    for i in range(3):
        state = begun(model, 1)
        expected.append([fused.logits(tokens(1, seed=10 * i + t), state) for t in range(20)])
    found: list[list[torch.Tensor]] = [[] for _ in range(3)]

    def work(i: int) -> None:
        state = begun(model, 1)
        found[i].extend(fused.logits(tokens(1, seed=10 * i + t), state) for t in range(20))

    with torch.no_grad():
        threads = [threading.Thread(target=torch.no_grad()(work), args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for mine, theirs in zip(found, expected) for a, b in zip(mine, theirs))


def test_generate_uses_the_step(model, monkeypatch):
    ids = tokens(2, 5)
    drawn = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert type(decode._decoders[model]).__name__ == "HostDecoder"
    with ops.use_implementation("reference"):
        expected = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        assert model not in decode._decoders
    assert torch.equal(drawn, expected)


@torch.no_grad()
def test_a_vision_language_model_takes_the_step_for_words_alone():
    whole = VLMambaConfig(
        vision_config=SiglipVisionConfig(
            image_size=16, patch_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2,
        ),
        text_config=config(),
        image_token_id=66,
        num_text_tokens=60,
    )  # fmt: skip
    model = VLMambaForConditionalGeneration(whole).eval()
    state = begun(model.language_model, 1)
    again = state.clone()
    logits = model(torch.tensor([[5]]), cache_params=state).logits
    assert model.language_model in decode._decoders
    embeds = model.get_input_embeddings()(torch.tensor([[5]]))
    assert_close(logits, model(inputs_embeds=embeds, cache_params=again).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="image"):
        model(torch.tensor([[66]]), cache_params=state)


@torch.no_grad()
def test_changed_weights_and_int8_make_a_new_step(model):
    ids = tokens(1, 5)

    def fused_and_plain() -> tuple[torch.Tensor, torch.Tensor]:
        ours, theirs = MambaState.empty(3), begun(model, 1)
        model(tokens(1, 5, seed=9), cache_params=ours, use_cache=True)
        return decode.one_token(model, ids[:, :1], ours)[:, 0], plain(model, ids[:, :1], theirs)

    assert_close(*fused_and_plain(), rtol=1e-5, atol=1e-5)
    first = decode._decoders[model]
    model.backbone.layers[1].mixer.out_proj.weight.mul_(2)
    assert_close(*fused_and_plain(), rtol=1e-5, atol=1e-5)
    assert decode._decoders[model] is not first
    decode.read_as_int8(model)
    assert 1e-4 < error(*fused_and_plain()) < 0.1
    decode.read_as_int8(model, False)
    assert_close(*fused_and_plain(), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_refusals(model, recwarn):
    assert decode.refusal(model) is None
    assert decode.refusal(make(dtype=torch.float64)) == "the cpu kernels are not in use"
    assert "float16" in decode.refusal(make(dtype=torch.float16))
    assert "training" in decode.refusal(make().train())
    handle = model.backbone.layers[0].mixer.register_forward_hook(lambda *_: None)
    for _ in range(2):
        model.generate(tokens(1, 3), max_new_tokens=4, do_sample=False)
    handle.remove()
    assert len([w for w in recwarn if "module by module" in str(w.message)]) == 1
    many = begun(model, 9)
    assert decode.one_token(model, tokens(9, 1), many) is None  # torch's products are better at it
    with torch.enable_grad():
        assert decode.one_token(model, tokens(9, 1), many) is None


def test_without_llvmlite_the_modules_do_it():
    script = (
        "import sys; sys.modules['llvmlite'] = sys.modules['llvmlite.binding'] = None\n"
        "import warnings; warnings.simplefilter('ignore')\n"
        "import torch\nfrom transformers import MambaConfig\n"
        "from vlmamba.models import VLMambaForCausalLM, decode\n"
        f"model = VLMambaForCausalLM(MambaConfig(**{SIZES})).eval()\n"
        "out = model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)\n"
        "assert out.shape == (1, 5) and model not in decode._decoders\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_pace_takes_the_faster_way_and_looks_at_the_other_again():
    from vlmamba.ops.decode.cpu import Pace

    pace, taken = Pace(), []
    for i in range(200):
        threads = pace.choose(4)
        taken.append(threads)
        pace.note(threads, {1: 2.0, 4: 1.0 if i < 100 else 5.0}[threads])
    assert taken[:6] == [4, 1, 4, 1, 4, 1]
    assert taken[6:100].count(4) > 90
    assert taken[110:].count(1) > 80
    assert taken[110:].count(4) > 0
