"""Captured steps: frames, padding, rates in device memory, going on, and that the numbers are those of plain steps."""

from __future__ import annotations

import random

import pytest
import torch

from vlmamba.data.collate import Batch
from vlmamba.training import build, launch
from vlmamba.training.captured import MOST, Frame, Size
from vlmamba.training.checkpoint import Checkpoints, Progress
from vlmamba.training.config import ConfigError, RunConfig
from vlmamba.training.launch import make_feed
from vlmamba.training.metrics import read_metrics
from vlmamba.training.optimizer import rate_at, set_rates
from vlmamba.training.parallel import World
from vlmamba.training.step import Step

CPU = torch.device("cpu")
PACKED = {"global_batch": 4, "micro_batch": 4, "pack": True, "max_length": 400}


class Graphs:
    """Stands for captured graphs: a function is called when it is replayed, and not before."""

    def __init__(self) -> None:
        self.captured, self.replayed = 0, 0

    def __call__(self, function):
        self.captured += 1

        def replay():
            self.replayed += 1
            return function()

        return replay


def make_step(config: RunConfig, capture=False, device: torch.device = CPU) -> tuple[Step, list[list[Batch]]]:
    """A step over a fresh model, and the first batches of the run."""
    torch.manual_seed(0)
    model, processor = build.build(config.model, config.stage.image_mode)
    made = launch.make_step(model, processor, config, device)
    clip, bf16 = config.optim.grad_clip, config.optim.bf16
    step = Step(made.model, made.optimizer, device, processor.normalise, clip, bf16, made.parallel, capture)
    feed = make_feed(config, processor, CPU).batches()
    return step, [next(feed) for _ in range(10)]


def train(step: Step, batches: list[list[Batch]], config: RunConfig, first: int = 0) -> list[tuple[float, float]]:
    numbers = []
    for number, batch in enumerate(batches, first + 1):
        set_rates(step.optimizer, rate_at(number / 20, config.optim))
        numbers.append(step(batch).read())
    return numbers


def weights(step: Step) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in step.model.named_parameters()}


def all_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("change", [{}, {"pack": False}])
def test_numbers_are_those_of_plain_steps(recipe, change) -> None:
    config = recipe(optim=PACKED | change)
    graphs = Graphs()
    plain, batches = make_step(config)
    framed, _ = make_step(config, graphs)
    assert len({tuple(b[0].input_ids.shape) for b in batches}) > 1 or "pack" not in change
    found, wanted = train(framed, batches * 2, config), train(plain, batches * 2, config)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(weights(plain).items(), weights(framed).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3, msg=name)
    assert framed.captured is not None
    assert 0 < graphs.captured <= MOST
    assert framed.captured.replayed == graphs.replayed > 4
    assert all(p.grad is None for p in framed.parameters)


def test_a_graph_changes_no_number(recipe, monkeypatch) -> None:
    """With graphs or without: the same frames, so the same bits."""
    config = recipe(optim=PACKED)
    framed, batches = make_step(config, Graphs())
    found = train(framed, batches, config)
    monkeypatch.setattr("vlmamba.training.captured.MOST", 0)
    none = Graphs()
    bare, _ = make_step(config, none)
    assert found == train(bare, batches, config)
    assert all_equal(weights(framed), weights(bare))
    assert none.captured == 0
    assert "10 steps kernel by kernel" in bare.captured.note()
    assert bare.captured.note() is None


def test_it_goes_on_from_a_checkpoint(recipe, tmp_path) -> None:
    config = recipe(optim=PACKED)
    whole, batches = make_step(config, Graphs())
    train(whole, batches[:6], config)
    checkpoints = Checkpoints(tmp_path / "kept", 1, World())
    checkpoints.save(whole.model, whole.optimizer, Progress(step=6))
    checkpoints.wait()
    wanted = train(whole, batches[6:], config, first=6)
    graphs = Graphs()
    other, _ = make_step(config, graphs)
    train(other, batches[:4], config)  # graphs of other moments than those that it will go on with
    before = graphs.captured
    assert checkpoints.load(other.model, other.optimizer)[1].step == 6
    assert train(other, batches[6:], config, first=6) == wanted
    assert all_equal(weights(whole), weights(other))
    assert graphs.captured > before


def test_what_a_frame_held_before_is_gone(recipe) -> None:
    _, batches = make_step(recipe(optim=PACKED))
    one, other = (b[0] for b in random.Random(0).sample(batches, 2))
    size = Size(8, 400, 8, 512, packed=True)
    used, fresh = (Frame(size, one, CPU) for _ in range(2))
    used.fill(one, 3)
    used.fill(other, 5)
    fresh.fill(other, 5)
    rows, length = other.input_ids.shape
    for name in ("input_ids", "labels", "seq_idx", "pixels"):
        assert torch.equal(getattr(used.batch, name), getattr(fresh.batch, name)), name
    assert torch.equal(used.batch.labels[:rows, :length], other.labels)
    assert (used.batch.seq_idx[rows:] == -1).all()
    assert used.items == 5


def test_surplus_rows_images_and_labels_change_nothing(recipe) -> None:
    config = recipe(optim=PACKED, stage={"vision": {"lr": 1e-2}})
    plain, batches = make_step(config)
    framed, _ = make_step(config, Graphs())
    batch = next(b[0] for b in batches if b[0].pixels is not None)
    rows, length = batch.input_ids.shape
    frame = Frame(Size(rows + 3, length + 64, len(batch.pixels) + 2, 2 * batch.num_labels, packed=True), batch, CPU)
    frame.batch.pixels.random_(0, 255)
    frame.fill(batch, batch.num_labels)
    assert (frame.batch.pixels[len(batch.pixels) :] == 0).all()
    found = framed._learn(frame.batch, frame.items)
    torch.testing.assert_close(found, torch.tensor(plain([batch]).read()), rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(weights(plain).items(), weights(framed).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_the_log_tells_of_graphs_and_of_steps_without(recipe, tmp_path, monkeypatch, capsys) -> None:
    made, graphs = launch.Step, Graphs()
    monkeypatch.setattr("vlmamba.training.captured.MOST", 1)
    monkeypatch.setattr(launch, "Step", lambda *arguments: made(*arguments[:-1], graphs))
    launch.run(recipe(optim=PACKED | {"max_steps": 12}))
    said = capsys.readouterr().err
    assert said.count("captured: ") == graphs.captured == 1
    assert "steps kernel by kernel" in said
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["lr"] == pytest.approx(1.0, abs=0.1)


def test_sizes_are_few_and_no_smaller_than_the_batch(recipe) -> None:
    _, batches = make_step(recipe(optim=PACKED))
    for (batch,) in batches:
        size = Size.of(batch)
        rows, length = batch.input_ids.shape
        assert rows <= size.rows <= rows * 9 / 8
        assert length <= size.length <= length * 9 / 8
        assert batch.num_labels <= size.labels <= size.rows * size.length
    wide = torch.zeros(13, 2500, dtype=torch.int64)
    batch = Batch(wide, wide, wide.int(), torch.zeros(64, 3, 2, 2), 1900, 9, ())
    assert Size.of(batch) == Size(13, 2560, 64, 4096, packed=True)


def test_an_encoder_alone(recipe) -> None:
    vision = {"image_size": 128, "patch_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = recipe(
        model={"vision": vision | {"num_attention_heads": 2}, "language": None, "vision_layer": -1},
        data=[{"scenes": {"seed": 2, "what": "patches"}, "size": 40}],
        stage={"vision": {"lr": 1e-2}, "connector": {"lr": 0.0}, "language": {"lr": 0.0}},
        optim={"global_batch": 4, "micro_batch": 4, "max_length": 400},
    )
    plain, batches = make_step(config)
    framed, _ = make_step(config, Graphs())
    found, wanted = train(framed, batches, config), train(plain, batches, config)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-6)
    assert framed.captured.replayed == len(batches) - 1


def test_what_no_graph_can_hold_is_told(recipe) -> None:
    def capture(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    step, batches = make_step(recipe(optim=PACKED), capture)
    step(batches[0])
    with pytest.raises(ValueError, match=r"cannot be captured \(operation not permitted when stream is capturing\)"):
        step(batches[0])
    assert not any(group["capturable"] for group in step.optimizer.param_groups)


def test_nan_is_told(recipe) -> None:
    step, batches = make_step(recipe(optim=PACKED), Graphs())
    same = [batches[0]] * 4
    train(step, same, recipe(optim=PACKED))
    with torch.no_grad():
        next(iter(step.model.connector.parameters())).fill_(torch.nan)
    loss, norm = step(batches[0]).read()
    assert loss != loss
    assert norm != norm


def test_images_that_do_not_fit_are_refused(recipe) -> None:
    step, batches = make_step(recipe(optim=PACKED), Graphs())
    batch = next(b[0] for b in batches if b[0].pixels is not None)
    torn = Batch(**vars(batch) | {"pixels": batch.pixels[1:]})
    with pytest.raises(ValueError, match="image placeholders"):
        step([torn])


@pytest.mark.parametrize(
    "optim", [{"micro_batch": 2, "global_batch": 4}, {"compile": True}, {"checkpoint_activations": 0.5}]
)
def test_what_cannot_be_captured_is_refused(recipe, optim) -> None:
    with pytest.raises(ConfigError, match=r"optim\.capture"):
        recipe(optim=PACKED | {"capture": True} | optim)


def test_several_processes_are_refused(recipe) -> None:
    config = recipe(optim=PACKED | {"capture": True})
    model, processor = build.build(config.model, config.stage.image_mode)
    with pytest.raises(ConfigError, match="one process, not for 2"):
        launch.make_step(model, processor, config, CPU, World(0, 2))


def test_a_cpu_says_so_once_and_trains(recipe, tmp_path, capsys) -> None:
    launch.run(recipe(optim=PACKED | {"capture": True}))
    assert capsys.readouterr().err.count("optim.capture: graphs are for CUDA") == 1
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 6
    assert max(line["lr"] for line in lines) > 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lora", [None, {"rank": 2, "dropout": 0.0}])
def test_graphs_on_a_gpu(recipe, tmp_path, monkeypatch, lora) -> None:
    """Ten captured steps, batches of several sizes, then ten more after a checkpoint: bit for bit those without
    graphs."""
    gpu = torch.device("cuda")
    config = recipe(optim=PACKED, model={"language": {"hidden_size": 32, "num_hidden_layers": 2}}, lora=lora)

    def sittings(name: str) -> tuple[list[tuple[float, float]], Step, Step]:
        step, batches = make_step(config, capture=True, device=gpu)
        numbers = train(step, batches, config)
        checkpoints = Checkpoints(tmp_path / name, 1, World())
        checkpoints.save(step.model, step.optimizer, Progress(step=10))
        checkpoints.wait()
        later, _ = make_step(config, capture=True, device=gpu)
        checkpoints.load(later.model, later.optimizer)
        return numbers + train(later, batches, config, first=10), step, later

    found, first, second = sittings("captured")
    assert first.captured.replayed > 0
    assert second.captured.replayed > 0
    monkeypatch.setattr("vlmamba.training.captured.MOST", 0)
    wanted, bare, last = sittings("bare")
    assert bare.captured.replayed == 0
    assert found == wanted
    assert all_equal(weights(second), weights(last))
