"""Runs: exact resume, interruption, checkpoints, refusal of what would go wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError

from vlmamba.commands import load
from vlmamba.models.processor import VLMambaProcessor
from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import build, checkpoint, launch, run
from vlmamba.training.config import ConfigError
from vlmamba.training.metrics import read_metrics
from vlmamba.training.parallel import World
from vlmamba.training.plan import dry_run
from vlmamba.training.step import Step
from vlmamba.training.trainer import INTERRUPTED, BadDataError, Interrupted, NonFiniteError, SpikeError


def losses(folder: str) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(Path(folder) / "metrics.jsonl")]


def after(monkeypatch, step: int, action) -> None:
    """Does `action` once, right after step number `step` of the sitting."""
    original, count = Step.__call__, iter(range(1, 1000))

    def call(self, *arguments):
        result = original(self, *arguments)
        if next(count) == step:
            action()
        return result

    monkeypatch.setattr(Step, "__call__", call)


def weights(model: Path) -> dict[str, torch.Tensor]:
    return VLMambaForConditionalGeneration.from_pretrained(model).state_dict()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(recipe, tmp_path, monkeypatch, number, workers) -> None:
    optim = {"pack": True, "group_by_length": True}
    whole = run(recipe(output=str(tmp_path / "whole"), optim=optim))
    cut = recipe(output=str(tmp_path / "cut"), workers=workers, optim=optim)
    with monkeypatch.context() as patch:
        after(patch, 3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted) as stopped:
            run(cut)
    assert stopped.value.code == INTERRUPTED
    assert stopped.value.saved.name == "step-000003"
    assert not (tmp_path / "cut/model").exists()
    resumed = run(cut)
    assert losses(cut.output) == losses(str(tmp_path / "whole"))
    assert [step for step, *_ in losses(cut.output)] == [1, 2, 3, 4, 5, 6]
    a, b = weights(whole), weights(resumed)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_death_between_checkpoints_costs_only_the_steps_since(recipe, tmp_path, monkeypatch) -> None:
    whole, cut = recipe(output=str(tmp_path / "whole")), recipe(output=str(tmp_path / "cut"))
    run(whole)

    def die() -> None:
        raise KeyError("power cut")

    with monkeypatch.context() as patch:
        after(patch, 4, die)
        with pytest.raises(KeyError):
            run(cut)
    torn = tmp_path / "cut/checkpoints/step-000002"
    assert torn.is_dir()
    run(cut)
    assert losses(cut.output) == losses(whole.output)


def test_torn_checkpoints_are_passed_over(recipe, tmp_path, capsys) -> None:
    config = recipe()
    run(config)
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000004", "step-000006"]
    data = (folder / "step-000006/__0_0.distcp").read_bytes()
    (folder / "step-000006/__0_0.distcp").write_bytes(data[:-1] + b"x")
    assert checkpoint.find_latest(folder) == folder / "step-000004"
    assert "__0_0.distcp is damaged" in capsys.readouterr().out
    (folder / "step-000004/manifest.json").unlink()
    assert checkpoint.find_latest(folder) is None


def test_the_newest_is_found_and_kept_by_its_number(recipe, tmp_path) -> None:
    config = recipe()
    run(config)
    folder = tmp_path / "run/checkpoints"
    for old, new in ((4, "step-999998"), (6, "step-1000000")):
        (folder / f"step-{old:06d}").rename(folder / new)
    (folder / "step-1000000-copy").mkdir()  # somebody's own
    assert checkpoint.find_latest(folder) == folder / "step-1000000"
    state = json.loads((folder / "step-1000000/state.json").read_text())
    model = torch.nn.Linear(1, 1)
    checkpoints = checkpoint.Checkpoints(folder, keep=2)
    checkpoints.save(model, torch.optim.AdamW(model.parameters()), checkpoint.Progress(**state | {"step": 1_000_001}))
    checkpoints.wait()
    names = {path.name for path in folder.glob("step-*")}
    assert names == {"step-1000000", "step-1000000-copy", "step-1000001"}


@pytest.mark.parametrize(("keep", "damaged"), [(1, [300]), (2, [200, 300])])
def test_damaged_ones_of_later_steps_give_way(tmp_path, keep, damaged) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = checkpoint.Checkpoints(tmp_path, keep)
    for step in damaged:
        checkpoints.save(model, optimizer, checkpoint.Progress(step=step))
        checkpoints.wait()
        (tmp_path / f"step-{step:06d}/manifest.json").write_text("torn")
    checkpoints = checkpoint.Checkpoints(tmp_path, keep)
    assert checkpoints.load(model, optimizer) is None
    for step in (50, 100):
        checkpoints.save(model, optimizer, checkpoint.Progress(step=step))
        checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000050", "step-000100"][-keep:]
    assert checkpoint.find_latest(tmp_path) == tmp_path / "step-000100"


class Hostile:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint ran",))


def test_a_checkpoint_runs_no_code(tmp_path) -> None:
    """Its hashes are no protection: who writes a checkpoint writes them too."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    folder = checkpoints.save(model, optimizer, checkpoint.Progress(step=1))
    checkpoints.wait()
    checkpoint._make_moments(optimizer)
    with_bytes = dict(checkpoint._tensors(model, optimizer)) | {"model.bias": Hostile()}
    for name in ("metadata", "tensor"):
        if name == "metadata":
            (folder / ".metadata").write_bytes(pickle.dumps(Hostile()))
        else:
            checkpoint.dcp.save(with_bytes, checkpoint_id=folder, no_dist=True)
        (folder / checkpoint.MANIFEST).unlink()
        checkpoint._seal(folder)
        with pytest.raises(ValueError, match=r"\.metadata is refused: .* has no place in a checkpoint"):
            checkpoints.load(model, optimizer)


class FullDisk(checkpoint.dcp.FileSystemWriter):
    """Has no room for the checkpoint of step 4, as torch.save finds out, and DCP tells, in ways of their own."""

    def write_data(self, *arguments):
        if "000004" in str(self.path):
            try:
                raise OSError(28, "No space left on device")
            finally:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
        return super().write_data(*arguments)


def test_full_disk_keeps_the_last_good_checkpoint(recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint.dcp, "FileSystemWriter", FullDisk)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-000004 .*\(\[Errno 28\] No space left on device\)"):
        run(recipe())
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-000002"]
    assert checkpoint.broken(folder / "step-000002") is None
    monkeypatch.undo()
    run(recipe())
    assert [step for step, *_ in losses(str(tmp_path / "run"))] == [1, 2, 3, 4, 5, 6]


def test_no_room_for_the_model_keeps_the_last_checkpoint(recipe, tmp_path, monkeypatch) -> None:
    def save(*_) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(build, "save", save)
    with pytest.raises(OSError, match=r"the model could not be written .*No space left"):
        run(recipe())
    assert not (tmp_path / "run/model").exists()
    monkeypatch.undo()
    assert (run(recipe()) / "model.safetensors").is_file()


def test_nan_stops_with_the_batch(recipe, tmp_path, monkeypatch) -> None:
    original = Step._accumulate

    def accumulate(self, batch, labels):
        loss = original(self, batch, labels)
        return loss * float("nan") if "s7" in batch.ids else loss

    monkeypatch.setattr(Step, "_accumulate", accumulate)
    with pytest.raises(NonFiniteError, match="loss nan"):
        run(recipe())
    (dump,) = (tmp_path / "run").glob("nonfinite-step-*.pt")
    batches = torch.load(dump, weights_only=True)
    assert any("s7" in batch["ids"] for batch in batches)


def test_a_spike_stops_with_the_batch(recipe, tmp_path, monkeypatch) -> None:
    original, steps = Step._accumulate, iter(range(1000))

    def accumulate(self, batch, labels):
        return original(self, batch, labels) * (1 if next(steps) < 58 else 1e3)

    monkeypatch.setattr(Step, "_accumulate", accumulate)
    with pytest.raises(SpikeError, match=r"step 59: .* was usual \(optim\.spike\)"):
        run(recipe(optim={"max_steps": 70, "micro_batch": 4}, checkpoint={"every": 100}, logging={"every": 100}))
    assert (tmp_path / "run/spike-step-59.pt").is_file()


def test_result_loads_and_card_says_how(recipe, tmp_path) -> None:
    folder = run(recipe())
    model = VLMambaForConditionalGeneration.from_pretrained(folder)
    processor = VLMambaProcessor.from_pretrained(folder)
    inputs = processor(text="<image>\nWhat?", images=Image.new("RGB", (9, 9)), return_tensors="pt")
    assert model(**inputs).logits.shape[1] == 4 + len(processor.tokenizer("\nWhat?").input_ids)
    card = (folder / "README.md").read_text()
    assert card.index("import vlmamba") < card.index("AutoModel")
    assert "max_steps: 6" in card
    assert (tmp_path / "run/curve.svg").read_text().startswith("<svg")
    page = (tmp_path / "run/curve.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    (source,) = json.loads((tmp_path / "run/data.json").read_text())
    assert source["samples"] == 12
    assert len(source["hash"].split()[0]) == 64
    assert {"torch", "vlmamba", "git"} <= json.loads((tmp_path / "run/versions.json").read_text()).keys()


def test_finished_run_is_left_alone(recipe, monkeypatch, capsys) -> None:
    folder = run(recipe())
    monkeypatch.setattr(Step, "__call__", lambda *_: pytest.fail("trained again"))
    assert run(recipe(workers=3, logging={"every": 5})) == folder
    assert "finished already" in capsys.readouterr().out


def test_changed_data_are_noticed(recipe, dataset, tmp_path, capsys) -> None:
    run(recipe())
    shutil.rmtree(tmp_path / "run/model")
    file = dataset / "data.json"
    file.write_text(file.read_text() + " ")
    run(recipe())
    assert "the data are not those that this run began with" in capsys.readouterr().err


def test_another_recipe_in_the_same_folder(recipe, tmp_path) -> None:
    run(recipe())
    with pytest.raises(ConfigError, match=r"optim\.max_length was 256, now 128"):
        run(recipe(optim={"max_length": 128}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    with pytest.raises(ConfigError, match="holds no run"):
        run(recipe(output=str(tmp_path / "other")))


def test_a_run_begun_before_an_option_was_there_goes_on(recipe, tmp_path) -> None:
    file = run(recipe()).parent / "config.yaml"
    stored = yaml.safe_load(file.read_text())
    del stored["optim"]["capture"]
    file.write_text(yaml.safe_dump(stored))
    run(recipe())
    file.write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml: holds no mapping"):
        run(recipe())


def test_bad_samples_are_counted_and_too_many_stop_the_run(recipe, dataset, tmp_path, monkeypatch) -> None:
    (dataset / "images/3.png").write_bytes(b"broken")
    run(recipe())
    lines = (tmp_path / "run/skipped.jsonl").read_text().splitlines()
    assert lines
    assert all("3.png" in json.loads(line)["reason"] for line in lines)
    for i in range(11):
        (dataset / f"images/{i}.png").write_bytes(b"broken")
    with pytest.raises(BadDataError, match="max_bad_share"):
        run(recipe(output=str(tmp_path / "second"), optim={"max_steps": 30}))


def test_a_run_that_could_use_nothing_makes_no_model(recipe, dataset, tmp_path, capsys) -> None:
    """A few that were left out are told of."""
    (dataset / "images/3.png").write_bytes(b"broken")
    run(recipe(optim={"max_steps": 12}))
    assert "left out: " in "".join(capsys.readouterr())
    with pytest.raises(BadDataError, match="nothing was learned"):
        run(recipe(output=str(tmp_path / "none"), optim={"max_length": 5, "max_steps": 2}))
    assert not (tmp_path / "none/model").exists()
    run(recipe(output=str(tmp_path / "none")))  # the folder is the corrected recipe's


def test_a_run_that_never_began_leaves_its_folder_to_the_corrected_recipe(recipe, tmp_path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        run(recipe(data=[{"llava": {"file": "nowhere.json", "images": "nowhere"}}]))
    assert (tmp_path / "run/config.yaml").is_file()
    run(recipe())
    with pytest.raises(ConfigError, match="another recipe"):
        run(recipe(seed=99))


def test_time_budget_ends_the_run(recipe, tmp_path, monkeypatch) -> None:
    run(recipe(optim={"max_steps": 100000, "time_budget": 0.02}))
    last = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert 1.2 <= last["elapsed_s"] < 5
    assert last["progress"] >= 1
    assert last["lr"] < 0.3


def test_a_dry_run_tells_the_time_budget(recipe) -> None:
    assert "it ends after 0.5 minutes" in "\n".join(dry_run(recipe(optim={"time_budget": 0.5})))
    assert "minutes, however" not in "\n".join(dry_run(recipe()))


def test_time_budget_begins_after_the_first_step(recipe, tmp_path, monkeypatch) -> None:
    """The first step compiles kernels: with a cold cache that takes longer than a short stage."""
    step, calls = Step.__call__, []

    def slow_at_first(self, *args):
        calls.append(time.sleep(2.0 if not calls else 0.0))
        return step(self, *args)

    monkeypatch.setattr(Step, "__call__", slow_at_first)
    run(recipe(optim={"max_steps": 100000, "time_budget": 0.02}))
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert lines[0]["progress"] < 0.5
    assert len(calls) > 3
    assert 1.2 <= lines[-1]["elapsed_s"] < 5


def test_events_for_tensorboard(recipe, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    run(recipe(logging={"tensorboard": True}))
    assert list((tmp_path / "run/tensorboard").glob("events.*"))


def test_unknown_device(recipe) -> None:
    with pytest.raises(ConfigError, match="abacus"):
        run(recipe(device="abacus"))
    with pytest.raises(ConfigError, match="abacus"):
        list(dry_run(recipe(device="abacus")))


def test_a_gpu_by_number_becomes_the_current_one(monkeypatch) -> None:
    """On which kernels are launched and events recorded, and whose generator a checkpoint holds."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert launch.pick_device("cuda:1") == load.pick_device("cuda:1") == torch.device("cuda:1")
    launch.pick_device("cuda", World(rank=3, size=4, local_rank=0))
    launch.pick_device("cpu")
    assert chosen == [torch.device("cuda:1"), torch.device("cuda:1"), torch.device("cuda:0")]
    with pytest.raises(ConfigError, match="torch sees 2 CUDA devices"):
        launch.pick_device("cuda:2")


def test_a_negative_rate(recipe) -> None:
    with pytest.raises(ConfigError, match=r"stage\.connector\.lr: is -1"):
        recipe(stage={"connector": {"lr": -1.0}, "language": {"lr": 0.0}})


def test_it_learns(recipe, tmp_path) -> None:
    run(recipe(optim={"max_steps": 60}, checkpoint={"every": 100}))
    numbers = [line["loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert numbers[-1] < 0.6 * numbers[0]
