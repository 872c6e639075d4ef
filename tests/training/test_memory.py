"""The dry run's memory beside full-size steps that are traced: every tensor in its size, none with any content.

Fake tensors pass through the real model, autocast, activation checkpointing and backward pass with the shapes that the
Triton kernels give, and what is alive is added up.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmamba import ops
from vlmamba.training import launch
from vlmamba.training.config import RunConfig, from_mapping
from vlmamba.training.estimate import _Memory
from vlmamba.training.lora import add_adapters
from vlmamba.training.optimizer import freeze, parameter_groups
from vlmamba.training.outline import outline


class Alive(TorchDispatchMode):
    """Bytes of all storages that operations made and something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = -(-storage.nbytes() // 512) * 512  # as the CUDA allocator rounds
        weakref.finalize(storage, self.drop, key)
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def traced(config: RunConfig, rows: int, length: int, images: int) -> int:
    """Bytes at the peak of a step of two micro-batches."""
    model = outline_frozen(config)
    with FakeTensorMode(allow_non_fake_inputs=True), ops.use_implementation("triton"):
        model.to_empty(device="cpu").tie_weights()
        launch.prepare(model, config)
        optimizer = torch.optim.AdamW(parameter_groups(model, config.stage))
        learning = [p for group in optimizer.param_groups for p in group["params"]]
        held = [*model.parameters(), *(torch.empty_like(p) for p in learning for _ in range(2))]
        alive = Alive()
        for tensor in held:
            alive.add(tensor)
        with alive:
            ids, seq_idx = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, length, dtype=torch.int32)
            rest = {"seq_idx": seq_idx, "num_items_in_batch": 1, "use_cache": False}
            pixels = torch.zeros(images, 3, model.vision_tower.image_size, model.vision_tower.image_size)
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    out = model(input_ids=ids, pixel_values=pixels, labels=ids, num_labels=ids.numel() // 10, **rest)
                out.loss.backward()
                del out
    return alive.peak


BOTH = {"connector": {"lr": 2e-5}, "language": {"lr": 2e-5}}


@pytest.mark.parametrize(
    ("stage", "language", "checkpointed", "rows", "lora"),
    [
        ({"connector": {"lr": 1e-3}}, "state-spaces/mamba-2.8b-slimpj", False, 2, None),
        (BOTH, "state-spaces/mamba-2.8b-slimpj", False, 2, None),
        (BOTH, "state-spaces/mamba-2.8b-slimpj", 0.25, 2, None),
        (BOTH, "state-spaces/mamba-2.8b-slimpj", True, 1, None),
        (BOTH, "state-spaces/mamba-130m", False, 4, None),
        (BOTH, "state-spaces/mamba-2.8b-slimpj", True, 1, {"rank": 16}),
        (BOTH, "state-spaces/mamba-130m", False, 4, {"rank": 16}),
    ],
)
def test_within_a_tenth_of_a_full_size_step(as_on_a_gpu, stage, language, checkpointed, rows, lora) -> None:
    config = from_mapping(
        RunConfig,
        {
            "output": "none",
            "model": {"vision": "google/siglip-so400m-patch14-384", "language": language},
            "data": [{"llava": {"file": "none.json"}}],
            "stage": stage,
            "lora": lora,
            "optim": {
                "global_batch": 32, "micro_batch": 16, "pack": True, "pack_into": 8192,
                "checkpoint_activations": checkpointed,
            },
        },
    )  # fmt: skip
    images = 11 * rows
    counted = _Memory(outline_frozen(config), config, "cuda", 1).peak(rows * 8192, images)["peak"]
    assert counted == pytest.approx(traced(config, rows, 8192, images), rel=0.1)


def outline_frozen(config: RunConfig) -> Any:
    model = outline(config.model)
    if config.lora is not None:
        add_adapters(model, config.lora)
    freeze(model, config.stage, config.lora.parts if config.lora is not None else ())
    return model
