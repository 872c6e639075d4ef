"""Adapters take part wherever they are put, learn, and are worth as much merged, saved and loaded again."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmamba import ops
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import build, run
from vlmamba.training.config import ConfigError, LoraConfig
from vlmamba.training.launch import make_feed, make_step, whole_state
from vlmamba.training.lora import add_adapters, find_targets, merged
from vlmamba.training.metrics import read_metrics
from vlmamba.training.optimizer import part_of
from vlmamba.training.parallel import World

peft = pytest.importorskip("peft")

CPU = torch.device("cpu")
TARGETS = [
    (part, target)
    for part, targets in {
        "language": ("in_proj", "x_proj", "dt_proj", "out_proj"),
        "connector": ("vss.in_proj", "vss.x_proj", "vss.dt_proj", "vss.out_proj", "linear_in", "linear_out"),
        "vision": ("q_proj", "k_proj", "v_proj", "self_attn.out_proj", "fc1", "fc2"),
    }.items()
    for target in targets
]
RATES = {part: {"lr": 1e-2} for part in ("vision", "connector", "language")}


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        out = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False).logits
    model.train()
    return out


def check_targets(recipe: Any, device: torch.device, template: str = "v1") -> None:
    """Each target's adapter receives a gradient, and once it is not zero it moves the output."""
    config = recipe(stage=RATES | {"template": template})
    torch.manual_seed(0)
    model, processor = build.build(config.model, "pad")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):  # dt is small at first, and little hangs on it
                parameter.fill_(1.0)
            elif name.endswith(("x_proj.weight", "dt_proj.weight")):
                parameter.mul_(10.0)
    lora = LoraConfig(4, 8.0, 0.0, [target for _, target in TARGETS], ["vision", "connector", "language"])
    names = add_adapters(model, lora)
    step = make_step(model, processor, config, device)
    batches = (batch for step in make_feed(config, processor, device).batches() for batch in step)
    inputs = step.inputs(next(batch for batch in batches if batch.pixels is not None))
    model(**inputs, use_cache=False).loss.backward()
    layers = dict(model.named_modules())
    for _, target in TARGETS:
        mine = [layers[name] for name in names if f".{name}".endswith(f".{target}")]
        assert mine, target
        assert all(layer.lora_B.default.weight.grad.abs().sum() > 0 for layer in mine), target
    before = logits(model, inputs)
    for part, target in TARGETS:
        mine = [n for n in names if f".{n}".endswith(f".{target}") and part_of(f"{n}.weight") == part]
        with torch.no_grad():
            for name in mine:
                layers[name].lora_B.default.weight.normal_()
        # dt is small, and little hangs on it: but far more than rounding.
        assert (logits(model, inputs) - before)[..., :200].abs().max() > 1e-6, (part, target)
        with torch.no_grad():
            for name in mine:
                layers[name].lora_B.default.weight.zero_()
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_every_target_takes_part(recipe, implementation) -> None:
    with ops.use_implementation(implementation):
        check_targets(recipe, CPU)


def test_every_target_takes_part_in_triton(recipe, monkeypatch) -> None:
    """On a GPU where there is one, else interpreted."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "ops"))
    device = import_module("interpreter").DEVICE
    with ops.use_implementation("triton"):
        check_targets(recipe, torch.device(device), "plain")  # the shorter one: the interpreter is slow


def test_only_adapters_and_the_connector_learn(recipe) -> None:
    config = recipe(lora={"rank": 2})
    model, processor = build.build(config.model, "pad")
    step = make_step(model, processor, config, CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for group in step.optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    batches = make_feed(config, processor, CPU).batches()
    for _ in range(2):  # the first step moves B alone, for it is zero
        step(next(batches))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {n for n in before if ".lora_" in n or n.startswith("connector.")}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_merged_weights_compute_the_same(recipe) -> None:
    config = recipe(lora={"rank": 2, "parts": ["language", "connector"]})
    model, processor = build.build(config.model, "pad")
    step = make_step(model, processor, config, CPU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
    inputs = step.inputs(next(make_feed(config, processor, CPU).batches())[0])
    expected = logits(model, inputs)
    plain, _ = build.build(config.model, "pad")
    plain.load_state_dict(merged(whole_state(model, World()), config.lora), strict=False)
    torch.testing.assert_close(logits(plain, inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_run_saves_both(recipe, tiny_model, tmp_path) -> None:
    """model/ has the adapters merged; adapter/ goes onto the model it was trained on, through PEFT."""
    config = recipe(
        model=dict.fromkeys(("vision", "language", "tokenizer")) | {"path": str(tiny_model)},
        lora={"rank": 2},
        optim={"checkpoint_activations": True},
    )
    folder = run(config)
    numbers = [line["loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert numbers[-1] < numbers[0]
    result = VLMambaForConditionalGeneration.from_pretrained(folder)
    assert not [name for name, _ in result.named_parameters() if "lora" in name]
    base = VLMambaForConditionalGeneration.from_pretrained(tiny_model)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter")
    ids = torch.randint(2, 200, (2, 9))
    torch.testing.assert_close(adapted(input_ids=ids).logits, result(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    settings = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model)
    assert run(config) == folder


def test_a_language_model_alone(recipe) -> None:
    """Of a type for which PEFT would refuse out_proj."""
    config = recipe(model={"vision": None}, stage={"connector": {"lr": 0.0}}, lora={"rank": 2})
    model, _ = build.build(config.model, "pad")
    assert any(name.endswith("out_proj") for name in add_adapters(model, config.lora))


def test_what_is_not_there(recipe) -> None:
    model, _ = build.build(recipe().model, "pad")
    with pytest.raises(ConfigError, match=r"'q_projj' is no linear map of vision; those are fc1, fc2, k_proj"):
        find_targets(model, LoraConfig(targets=["q_projj"], parts=["vision"]))
    with pytest.raises(ConfigError, match=r"'lm_head' is no linear map"):
        find_targets(model, LoraConfig(targets=["lm_head"]))
    with pytest.raises(ConfigError, match=r"lora\.parts: vision has no learning rate"):
        recipe(lora={"parts": ["vision"]})
