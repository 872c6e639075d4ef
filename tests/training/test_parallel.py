"""One process, 2 x DDP and 2 x FSDP2 compute the same; what one wrote another goes on from; nobody waits for ever."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Job, run_jobs
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.distributed.utils import _to_kwargs

from vlmamba.models.vlm import VLMambaForConditionalGeneration
from vlmamba.training import build, launch, run
from vlmamba.training.checkpoint import find_latest
from vlmamba.training.launch import make_feed
from vlmamba.training.metrics import read_metrics
from vlmamba.training.parallel import World, _Loss, shard

# The dataset's one sample without an image is alone in its micro-batch: one of two processes then has none.
BASE: dict[str, Any] = {"optim": {"micro_batch": 1, "global_batch": 4, "max_steps": 4}, "checkpoint": {"every": 2}}
LORA = {"lora": {"rank": 2, "parts": ["language", "connector"]}}
CONNECTOR_ALONE = {"stage": {"language": {"lr": 0.0}}}


def losses(folder: Path) -> list[float]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [line[key] for line in lines for key in ("loss", "grad_norm")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return VLMambaForConditionalGeneration.from_pretrained(folder / "model").state_dict()


def same(one: Path, other: Path, rel: float) -> None:
    assert losses(one) == pytest.approx(losses(other), rel=rel)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)


def damaged(dataset: Path) -> dict[str, Any]:
    """The data with bad samples: some micro-batches of one sample then hold nothing."""
    worse = dataset.with_name("worse")
    shutil.copytree(dataset, worse)
    for number in (2, 5, 6):
        (worse / f"images/{number}.png").write_bytes(b"broken")
    source = {"llava": {"file": str(worse / "data.json"), "images": str(worse / "images")}}
    return {"data": [source], "max_bad_share": 0.9}


def test_one_two_ddp_and_two_fsdp_are_one(recipe, dataset, tmp_path) -> None:
    def config(name: str, parallel: str = "ddp", **changes: Any) -> Any:
        return recipe(output=str(tmp_path / name), parallel=parallel, **BASE | changes)

    packed = {"optim": BASE["optim"] | {"pack": True, "checkpoint_activations": True}}
    for name, changes in (
        ("one", {}),
        ("one-connector", CONNECTOR_ALONE),
        ("one-packed", packed),
        ("one-bad", bad := damaged(dataset)),
        ("one-lora", LORA),
    ):
        run(config(name, **changes))
    jobs = [
        Job(config("ddp")),
        Job(config("fsdp", "fsdp")),
        Job(config("ddp-connector", "ddp", **CONNECTOR_ALONE)),
        Job(config("fsdp-connector", "fsdp", **CONNECTOR_ALONE)),
        Job(config("fsdp-packed", "fsdp", **packed)),
        Job(config("fsdp-bad", "fsdp", **bad)),
        Job(config("fsdp-lora", "fsdp", **LORA)),
        Job(config("cut", "fsdp"), stop_at=3),
        Job(config("other-kind", "fsdp"), stop_at=3),
        Job(config("other-kind", "ddp")),
    ]
    run_jobs(jobs, tmp_path)
    for kind in ("ddp", "fsdp"):
        same(tmp_path / kind, tmp_path / "one", 1e-5)
        same(tmp_path / f"{kind}-connector", tmp_path / "one-connector", 1e-5)
    for name in ("packed", "bad", "lora"):
        same(tmp_path / f"fsdp-{name}", tmp_path / f"one-{name}", 1e-5)

    # From two processes to one, and from one kind to the other.
    assert not (tmp_path / "cut/model").exists()
    assert find_latest(tmp_path / "cut/checkpoints") == tmp_path / "cut/checkpoints/step-000003"
    run(replace(config("cut"), parallel="ddp"))
    same(tmp_path / "cut", tmp_path / "fsdp", 1e-6)
    same(tmp_path / "other-kind", tmp_path / "fsdp", 1e-6)


@pytest.fixture
def alone():
    """A process group of one: enough for FSDP."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World()
    dist.destroy_process_group()


def cut(config: Any, world: World) -> tuple[_Loss, dict[str, Any]]:
    """A model under FSDP2 with its loss, and the inputs of a micro-batch."""
    device = torch.device("cpu")
    model, processor = build.build(config.model, "pad")
    step = launch.make_step(model, processor, config, device)
    whole = _Loss(model)
    shard(whole, world, device, bf16=True)
    return whole, step.inputs(next(make_feed(config, processor, device).batches())[0])


def test_small_parameters_stay_wide_in_bf16(recipe, alone) -> None:
    """In storage, as the forward pass sees them, in gradient and moment; and every part is cut."""
    whole, inputs = cut(recipe(), alone)
    assert all(isinstance(p, DTensor) and p.dtype == torch.float32 for p in whole.parameters())
    mixer = whole.model.language_model.backbone.layers[0].mixer
    seen: dict[str, set[torch.dtype]] = {"ssm": set(), "in_proj": set()}
    mixer.ssm.register_forward_hook(lambda module, _, out: seen["ssm"].update(t.dtype for t in out))
    mixer.in_proj.register_forward_hook(lambda module, *_: seen["in_proj"].add(module.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = whole(None, **inputs, use_cache=False)
    loss.backward()
    assert seen == {"ssm": {torch.float32}, "in_proj": {torch.bfloat16}}
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32, name


def test_the_whole_model_is_kept_by_the_main_process_alone(recipe, alone) -> None:
    """The others take part in its gathering, and need no room for it."""
    model = cut(recipe(), alone)[0].model
    state = launch.whole_state(model, alone)
    assert state.keys() == dict(model.named_parameters()).keys()
    assert not any(isinstance(tensor, DTensor) for tensor in state.values())
    assert launch.whole_state(model, World(rank=1, size=2)) == {}


def test_every_root_of_a_forward_pass_has_inputs(recipe, alone, monkeypatch) -> None:
    """FSDP moves a root's inputs to the GPU, and up to torch 2.11 that fails where there are none. A module that is
    called in a recomputation, after the pass of the real root, is taken for one."""
    original, roots = FSDPState._root_pre_forward, []

    def moving(self: Any, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        found = self._state_ctx.iter_forward_root
        original(self, module, args, kwargs)
        if found is None:
            moved, named = _to_kwargs(args, kwargs, self._device, False)
            args, kwargs = moved[0], named[0]
            roots.append(module)
        return args, kwargs

    monkeypatch.setattr(FSDPState, "_root_pre_forward", moving)
    whole, inputs = cut(recipe(optim={"checkpoint_activations": True}), alone)
    whole(None, **inputs, use_cache=False).backward()
    assert roots == [whole, whole.model.language_model.backbone.layers[0].mixer.ssm]
