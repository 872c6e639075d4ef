"""What a dry run counts, beside what training takes; and one batch learned by heart."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import yaml

from vlmamba.cli import main
from vlmamba.training import build
from vlmamba.training.config import ConfigError
from vlmamba.training.estimate import _Memory, estimate
from vlmamba.training.launch import make_feed, make_step
from vlmamba.training.outline import outline
from vlmamba.training.plan import dry_run, overfit

WIDE = {"language": {"hidden_size": 128, "num_hidden_layers": 6, "state_size": 16}}


def kept_for_backward(step, batch) -> int:
    """Bytes of tensors that autograd keeps at the end of the forward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.parallel.loss(step.inputs(batch), batch.num_labels, None)
    return sum(kept.values())


def test_activations_as_counted(recipe) -> None:
    """The largest and least certain term, on this CPU, in float32."""
    base = recipe()
    model = vars(base.model) | {"language": WIDE["language"]}
    config = recipe(model=model, optim={"pack": True, "micro_batch": 4, "max_length": 400, "pack_into": 400})
    built, processor = build.build(config.model, "pad")
    step = make_step(built, processor, config, torch.device("cpu"))
    batch = next(make_feed(config, processor, torch.device("cpu")).batches())[0]
    counted = estimate(config, "cpu")
    memory = _Memory(built, config, "cpu", 1)
    tokens = batch.input_ids.numel()
    expected = memory._layers(tokens)[0] + memory._connector(len(batch.pixels))
    assert kept_for_backward(step, batch) == pytest.approx(expected, rel=0.15)
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert counted.memory["moments"] == 8 * trained
    assert counted.memory["parameters"] == 4 * sum(p.numel() for p in built.parameters())


def test_sharing_and_checkpointing_save(recipe) -> None:
    one = estimate(recipe(), "cuda").memory
    two = estimate(recipe(parallel="fsdp"), "cuda", world=2).memory
    thrifty = estimate(recipe(optim={"checkpoint_activations": True}), "cuda").memory
    assert two["moments"] == one["moments"] / 2
    assert thrifty["peak"] < one["peak"]
    lora = estimate(recipe(lora={"rank": 1}, stage={"connector": {"lr": 0.0}}), "cuda")
    assert [part.trained > 0 for part in lora.parts] == [False, False, True]
    assert lora.parts[2].trained < 0.2 * lora.parts[2].parameters


def test_nothing_is_written(recipe, tmp_path) -> None:
    text = "\n".join(dry_run(recipe()))
    assert "max_steps: 6" in text
    assert "6 steps" in text
    assert not (tmp_path / "run").exists()


def test_sizes_are_those_of_the_model(recipe) -> None:
    config = recipe()
    built, _ = build.build(config.model, "pad")
    meta = outline(config.model)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_what_cannot_be_known(recipe, tmp_path) -> None:
    with pytest.raises(ConfigError, match="holds no VL-Mamba"):
        outline(recipe(model={"vision": None, "language": None, "tokenizer": None, "path": str(tmp_path)}).model)
    config = recipe(model={"language": "stage:nothing"})
    with pytest.raises(ConfigError, match="names no stage before this one"):
        outline(config.model)
    with pytest.raises(ConfigError, match="run the pipeline"):
        build.build(config.model, "pad")


def test_one_batch_is_learned_by_heart(recipe) -> None:
    losses = [loss for _, loss in overfit(recipe(), steps=300)]
    assert losses[-1] < 0.1 * losses[0]
    assert len(losses) < 300


def test_from_the_command_line(recipe, tmp_path, capsys) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(asdict(recipe())))
    assert main(["train", str(file), "--dry-run"]) == 0
    assert "at the peak" in capsys.readouterr().out
    assert main(["train", str(file), "optim.max_steps=3", "--overfit-one-batch"]) == 0
    assert "learned" in capsys.readouterr().out
    assert main(["train", "nano", "--overfit-one-batch"]) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "{}", "--dry-run"],
        ["--config={}", "--dry-run", "optim.max_steps=7"],
        ["optim.max_steps=7", "--dry-run", "--config", "{}", "--optim.epochs=2"],
        ["{}", "--dry-run", "optim.max_steps=7", "--output", "elsewhere"],
    ],
)
def test_the_recipe_may_be_an_option(recipe, tmp_path, capsys, words) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(asdict(recipe())))
    assert main(["train", *(word.format(file) for word in words)]) == 0
    said = capsys.readouterr().out
    assert "at the peak" in said
    assert ("max_steps: 7" in said) == ("optim.max_steps=7" in words)
    assert ("output: elsewhere" in said) == ("elsewhere" in words)


@pytest.mark.parametrize("missing", ["data.0.llava.file=gone.json", "data.0.llava.images=gone"])
def test_data_that_are_not_there(recipe, tmp_path, capsys, missing) -> None:
    """The plan is made all the same; the error is the run's."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(asdict(recipe())))
    assert main(["train", str(file), missing, "--dry-run"]) == 2
    planned = capsys.readouterr()
    assert "at the peak" in planned.out
    assert "gone" in planned.err
    assert main(["train", str(file), missing]) == 2
    assert capsys.readouterr().err.endswith(planned.err)


def test_a_run_is_named_after_its_recipe(capsys) -> None:
    main(["train", "paper/language-1.4b", "--dry-run"])
    assert "output: runs/language-1.4b/stage2" in capsys.readouterr().out


def test_no_recipe(capsys) -> None:
    assert main(["train", "optim.max_steps=7", "--dry-run"]) == 2
    assert "no recipe was named" in capsys.readouterr().err
    assert main(["train", "nano", "paper", "--dry-run"]) == 2
    assert "'paper' is not an override" in capsys.readouterr().err
