"""An encoder trained alone on patches: its loss, what it keeps, and recipes that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import SiglipVisionConfig

from vlmamba.data.scenes import FIELDS
from vlmamba.models.vision import VisionTower, build_vision_tower
from vlmamba.models.weights import load_vision
from vlmamba.training.build import build
from vlmamba.training.config import ConfigError
from vlmamba.training.launch import run
from vlmamba.training.metrics import read_metrics
from vlmamba.training.optimizer import part_of
from vlmamba.training.patches import EMPTY, PatchReader
from vlmamba.training.plan import dry_run, overfit

SCENES = [{"scenes": {"seed": 2, "what": "patches"}, "size": 40}]
VISION = {
    "image_size": 128,
    "patch_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.fixture
def alone(recipe, tokenizer_folder: Path):
    """A recipe for a small encoder alone."""

    def make(model=None, optim=None, **changes):
        whole = {"tokenizer": str(tokenizer_folder), "vision": VISION, "language": None, "vision_layer": -1}
        stage = {"vision": {"lr": 3e-3}, "connector": {"lr": 0.0}, "language": {"lr": 0.0}}
        settings = {"max_length": 1100} | (optim or {})
        return recipe(model=whole | (model or {}), data=SCENES, stage=stage, optim=settings, **changes)

    return make


def small_tower() -> VisionTower:
    """Of two by two patches."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    return build_vision_tower(config, -1)


def small() -> PatchReader:
    return PatchReader(small_tower())


def test_loss_is_that_of_every_field() -> None:
    reader, sizes = small(), [len(names) for names in FIELDS.values()]
    classes = torch.stack([torch.randint(0, size, (3, 4)) for size in sizes], 1)
    classes[0, :, 0] = 0
    labels = torch.cat([torch.full((3, 1), -100), classes.flatten(1)], 1)
    out = reader(pixel_values=torch.randn(3, 3, 16, 16), labels=labels, num_items_in_batch=50.0)
    expected, start = 0.0, 0
    for field, size in enumerate(sizes):
        chances = functional.log_softmax(out.logits[..., start : start + size].double(), -1)
        for b in range(3):
            for p in range(4):
                wanted = int(classes[b, field, p])
                expected -= chances[b, p, wanted].item() * (EMPTY if wanted == 0 else 1.0) / 50
        start += size
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)


def test_notes_count_what_is_right() -> None:
    reader = small()
    classes = torch.zeros(2, len(FIELDS), 4, dtype=torch.long)
    classes[0, 0, 1] = 5
    labels = torch.cat([torch.full((2, 1), -100), classes.flatten(1)], 1)
    with torch.no_grad():
        reader.heads.weight.zero_()
        reader.heads.bias.zero_()
        reader.heads.bias[5] = 1.0  # "what" is always 5, all else nothing
    reader(pixel_values=torch.zeros(2, 3, 16, 16), labels=labels)
    assert "what 100.0%, next 0.0%" in reader.notes()
    assert f"where nothing is: {1 - 7 / (len(FIELDS) * 8 - 1):.2%}" in reader.notes()


def test_a_run_keeps_the_encoder_and_goes_on(alone, tmp_path: Path, capfd) -> None:
    folder = run(alone(optim={"max_steps": 3}))
    assert "right where something is: what" in capfd.readouterr().err
    model, _ = build(alone(model={"vision": str(folder)}).model, "pad")
    assert isinstance(model, PatchReader)
    tower = load_vision(folder, layer=-1)
    assert torch.equal(
        tower.model.embeddings.patch_embedding.weight, model.vision_tower.model.embeddings.patch_embedding.weight
    )
    # Cut off after its last checkpoint, a run goes on to the same end.
    first = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    folder.rename(tmp_path / "done")
    again = load_vision(run(alone(optim={"max_steps": 3})), layer=-1)
    assert all(torch.equal(first[name], tensor) for name, tensor in again.state_dict().items())
    assert "Vision encoder" in (tmp_path / "done/README.md").read_text()


def test_one_batch_is_learned(alone) -> None:
    losses = [loss for _, loss in overfit(alone(optim={"global_batch": 2, "micro_batch": 2}), 150)]
    assert losses[-1] < 0.2 * losses[0]


def test_dry_run(alone) -> None:
    text = "\n".join(dry_run(alone()))
    assert f"rows of about {1 + len(FIELDS) * 64} tokens, 2 images" in text
    assert "\nvision: 0." in text
    assert "\nlanguage: 0." not in text


def test_heads_learn_with_the_encoder() -> None:
    assert {part_of(name) for name, _ in small().named_parameters()} == {"vision"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"vision_layer": -2}}, "model.vision_layer: is -2"),
        ({"optim": {"pack": True}}, "optim.pack"),
        ({"model": {"language": {"hidden_size": 16, "num_hidden_layers": 1}}}, "patches are for a model"),
        ({"model": {"vision": None}}, "patches are for"),
    ],
)
def test_recipes_that_cannot_be(alone, changes: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        alone(**changes)


def test_an_encoder_alone_learns_from_patches_only(recipe) -> None:
    with pytest.raises(ConfigError, match="learns from scenes, what: patches"):
        recipe(model={"language": None, "vision_layer": -1})
