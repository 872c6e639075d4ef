"""What is trained, at what rate, and that a step does not depend on how its batch is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vlmamba.training import build, launch
from vlmamba.training.launch import make_feed
from vlmamba.training.optimizer import freeze, is_decayed, parameter_groups, part_of, rate_at
from vlmamba.training.step import Step

CPU = torch.device("cpu")


def make_step(config, seed: int = 0) -> tuple[Step, list]:
    """A step over a fresh model, and the run's first batch."""
    torch.manual_seed(seed)
    model, processor = build.build(config.model, config.stage.image_mode)
    step = launch.make_step(model, processor, config, CPU)
    for group in step.optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    return step, next(make_feed(config, processor, CPU).batches())


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_cutting_changes_nothing(recipe, micro_batch) -> None:
    whole, batch = make_step(recipe(optim={"micro_batch": 4}))
    cut, pieces = make_step(recipe(optim={"micro_batch": micro_batch}))
    assert len(batch) == 1
    assert len(pieces) == 4 // micro_batch
    same_step(whole, batch, cut, pieces)


def test_packing_changes_nothing(recipe) -> None:
    config = recipe(optim={"pack": True, "micro_batch": 4, "max_length": 400})
    packed, batch = make_step(config)
    apart, _ = make_step(config)
    feed = make_feed(config, build.build(config.model, config.stage.image_mode)[1], CPU)
    feed.data.pack_into, feed.data.planned = None, False
    singles = feed.data[[[key] for row in feed.order.rows(0) for key in row]]
    assert singles.ids == batch[0].ids
    assert len(singles.ids) > len(batch[0].input_ids)
    same_step(packed, batch, apart, [singles])


def same_step(whole: Step, batch: list, cut: Step, pieces: list) -> None:
    one, other = whole(batch), cut(pieces)
    assert one.tally.labels == other.tally.labels
    assert other.read() == pytest.approx(one.read(), rel=1e-5)
    for (name, a), b in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_loss_is_the_mean_over_answer_tokens(recipe) -> None:
    step, batch = make_step(recipe())
    step.model.eval()
    logs = []
    for piece in batch:
        inputs = step.inputs(piece)
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = step.model(**inputs, use_cache=False).logits
        chosen = labels[:, 1:] != -100
        logs.append(logits[:, :-1].log_softmax(-1)[chosen].gather(1, labels[:, 1:][chosen][:, None]))
    step.model.train()
    loss, _ = step(batch).read()
    assert loss == pytest.approx(-float(torch.cat(logs).mean()), rel=1e-5)
    assert sum(map(len, logs)) == sum(b.num_labels for b in batch)


def test_only_the_stage_s_parts_move(recipe) -> None:
    step, batch = make_step(recipe(stage={"language": {"lr": 0.0}}))
    before = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step(batch)
    moved = {part_of(name) for name, p in step.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"connector"}
    assert all(p.grad is None for p in step.model.parameters())


def test_decay_spares_ssm_parameters_norms_and_biases(recipe) -> None:
    config = recipe(stage={p: {"lr": 1e-3, "weight_decay": 0.1} for p in ("vision", "connector", "language")})
    model, _ = build.build(config.model, "pad")
    freeze(model, config.stage)
    groups = parameter_groups(model, config.stage)
    decayed = {id(p) for g in groups if g["weight_decay"] > 0 for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert not [n for n in names if n.endswith(("A_log", ".D", "dt_bias", "bias")) or "norm" in n]
    assert {n.rsplit(".", 2)[-2] for n in names} >= {"in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "fc1"}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_ssm_parameters_are_named_as_they_are_spared() -> None:
    matrix, names = (
        torch.nn.Parameter(torch.zeros(2, 2)),
        ("a.A_log", "ssm.D", "ssm.dt_bias", "dt_proj.weight", "x.bias"),
    )
    assert [name for name in names if is_decayed(name, matrix)] == ["dt_proj.weight"]


def test_a_part_that_is_not_there(recipe) -> None:
    config = recipe(model={"vision": None}, stage={"vision": {"lr": 1e-3}})
    model, _ = build.build(config.model, "pad")
    freeze(model, config.stage)
    with pytest.raises(ValueError, match=r"stage\.vision.*no vision part"):
        parameter_groups(model, config.stage)


def test_trained_parameters_are_float32(recipe) -> None:
    config = recipe()
    model, _ = build.build(config.model, "pad")
    with pytest.raises(ValueError, match="must be stored in float32"):
        freeze(model.bfloat16(), config.stage)


def test_schedule(recipe) -> None:
    optim = recipe(optim={"warmup": 0.1, "final_lr": 0.2}).optim
    assert [rate_at(s, optim) for s in (0, 0.05, 0.1, 0.55, 1)] == pytest.approx([0, 0.5, 1, 0.6, 0.2])


def test_a_batch_with_nothing_to_learn(recipe) -> None:
    step, _ = make_step(recipe())
    with pytest.raises(ValueError, match="anything to learn"):
        step([])


@pytest.mark.parametrize("flag", ["checkpoint_activations", "compile"])
def test_flags_change_nothing(recipe, flag, monkeypatch) -> None:
    def compile_eager(self: torch.nn.Module) -> None:
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eager)
    plain, batch = make_step(recipe())
    flagged, same = make_step(recipe(optim={flag: True}))
    assert flagged(same).read() == pytest.approx(plain(batch).read(), rel=1e-5)


def test_images_and_placeholders_must_fit(recipe) -> None:
    step, batch = make_step(recipe())
    odd = next(piece for piece in batch if piece.pixels is not None)
    with pytest.raises(ValueError, match=r"image placeholders, its \d+ images give"):
        step([replace(odd, pixels=torch.cat([odd.pixels, odd.pixels]))])


def test_labels_are_as_many_as_were_counted(recipe) -> None:
    step, batch = make_step(recipe())
    with pytest.raises(ValueError, match=r"num_labels is 1, but \d+ positions"):
        step([replace(batch[0], num_labels=1)])
