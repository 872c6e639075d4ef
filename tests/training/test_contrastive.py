"""An encoder trained alone on pairs: both losses, what pads a batch, runs, recipes that cannot be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_patches import small_tower

from vlmamba.models.weights import load_vision
from vlmamba.training.config import ConfigError
from vlmamba.training.contrastive import ContrastivePairs
from vlmamba.training.launch import run
from vlmamba.training.optimizer import part_of
from vlmamba.training.plan import dry_run, overfit

KINDS = ("softmax", "sigmoid")


def small(kind: str) -> ContrastivePairs:
    return ContrastivePairs(small_tower(), 50, kind)


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Four placeholders and five words a row, the last one or two of them padding."""
    torch.manual_seed(1)
    ids = torch.cat([torch.full((rows, 4), 49), torch.randint(0, 48, (rows, 5))], 1)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[:, -1] = -100
    labels[0, -2] = -100
    return {"pixel_values": torch.randn(rows, 3, 16, 16), "input_ids": ids, "labels": labels}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_the_paper(kind: str) -> None:
    model = small(kind)
    out = model(**batch())
    table = out.logits.double().tolist()
    if kind == "softmax":
        rows = [row[i] - math.log(sum(map(math.exp, row))) for i, row in enumerate(table)]
        columns = [row[i] - math.log(sum(map(math.exp, row))) for i, row in enumerate(zip(*table))]
        expected = -(sum(rows) + sum(columns)) / 8
    else:
        signed = [(1 if i == j else -1) * table[i][j] for i in range(4) for j in range(4)]
        expected = sum(math.log1p(math.exp(-value)) for value in signed) / 4
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_pad_a_batch_change_nothing(kind: str) -> None:
    model, given = small(kind), batch()
    loss = model(**given).loss
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    padded = {
        "pixel_values": torch.cat([given["pixel_values"], torch.zeros(2, 3, 16, 16)]),
        "input_ids": torch.cat([given["input_ids"], torch.zeros(2, 9, dtype=torch.long)]),
        "labels": torch.cat([given["labels"], torch.full((2, 9), -100)]),
    }
    again = model(**padded).loss
    again.backward()
    assert again.item() == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_text_is_no_mistake(kind: str) -> None:
    model, given = small(kind), batch()
    for name in ("input_ids", "labels"):
        given[name][2] = given[name][1]
    others = [1, 2]
    logits = model(**given).logits.detach()
    logits[others, others[::-1]] = 100.0  # however sure the model is of the other's text
    there = torch.ones(4, dtype=torch.bool)
    words = given["input_ids"][:, 4:] * (given["labels"][:, 4:] != -100)
    assert model._loss(logits, words, there).item() < 20
    words = torch.arange(4)[:, None]
    assert model._loss(logits, words, there).item() > 20


def test_words_beyond_the_text_are_not_read() -> None:
    model, given = small("softmax"), batch()
    before = model(**given).logits
    given["input_ids"][:, -1] = 7
    assert torch.equal(model(**given).logits, before)
    given["input_ids"][:, 4] += 1
    assert not torch.equal(model(**given).logits, before)


def test_all_of_it_learns_at_the_encoders_rate() -> None:
    assert {part_of(name) for name, _ in small("sigmoid").named_parameters()} == {"vision"}


@pytest.fixture
def paired(recipe):
    """A recipe for a small encoder on the tiny pictures and their captions."""

    def make(model=None, optim=None, **changes):
        whole = {"language": None, "vision_layer": -1, "contrastive": "sigmoid"}
        stage = {"template": "plain", "vision": {"lr": 3e-3}, "connector": {"lr": 0.0}, "language": {"lr": 0.0}}
        data = [{"scenes": {"seed": 2, "what": "caption"}, "size": 40}]
        settings = {"global_batch": 4, "micro_batch": 4} | (optim or {})
        return recipe(model=whole | (model or {}), data=data, stage=stage | changes, optim=settings)

    return make


def test_a_run_keeps_the_encoder(paired, capfd) -> None:
    folder = run(paired(optim={"max_steps": 3}))
    assert "found in its batch: a picture's text" in capfd.readouterr().err
    assert load_vision(folder, layer=-1).hidden_size == 16
    assert not any("heads" in name for name in load_vision(folder, layer=-1).state_dict())
    assert "Vision encoder" in (Path(folder) / "README.md").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_is_learned(paired, kind: str) -> None:
    losses = [loss for _, loss in overfit(paired(model={"contrastive": kind}), 150)]
    assert losses[-1] < 0.2 * losses[0]


def test_dry_run(paired) -> None:
    assert "\nvision: " in "\n".join(dry_run(paired()))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"optim": {"micro_batch": 2}}, "optim.micro_batch"),
        ({"template": "v1"}, "stage.template"),
        ({"model": {"language": {"hidden_size": 16, "num_hidden_layers": 1}}}, "model.contrastive: is for"),
    ],
)
def test_recipes_that_cannot_be(paired, changes: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        paired(**changes)
