"""Several processes as one: DDP or FSDP2 under torchrun, put around a model that knows nothing of it.

    torchrun --nproc-per-node 2 -m vlmamba.cli train RECIPE parallel=fsdp

Every process walks through the same modules in the same order at each micro-batch, whatever its data hold, since each
module's gathering of weights and summing of gradients waits for all processes: a micro-batch without images sends a
blank one through encoder and connector, with weight zero.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlmamba.models.mamba import SSMParameters

Kind = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is.

    Attributes:
        rank, size: this process's number and how many there are.
        local_rank: its number on this machine: which GPU is its own.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums of each number over all processes (exact for integers below 2^53), on the CPU."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, thing: Any) -> list[Any]:
        """The thing of every process, by rank."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, thing)
        return found

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the main process, in every process; it runs there alone."""
        return self.gather(make() if self.is_main else None)[0]


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Joins the processes that torchrun started, once; a process that it did not start is alone.

    Args:
        device: as in a recipe; decides between NCCL and gloo. Small sums go over gloo in any case.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    world = World(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if dist.is_initialized():  # a stage of a pipeline that has joined
        yield world
        return
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=world.rank, world_size=size)
    try:
        yield world
    finally:
        dist.destroy_process_group()


class Parallel:
    """A model as one process of several trains it.

    Args:
        model: in training mode, frozen parts frozen. Under FSDP it may still be on the CPU: each part is moved when it
            is cut, so that no GPU ever holds the whole.
        kind: "ddp": every process holds the model, gradients are summed. "fsdp": every process holds its share of
            parameters, gradients and moments. With one process there is no difference.
        bf16: FSDP gathers weights in bf16. Stored shards and reduced gradients stay fp32 in any case, and A_log, D and
            the dt bias are gathered in fp32 too.
    """

    def __init__(self, model: nn.Module, world: World, device: torch.device, kind: Kind = "ddp", bf16: bool = False):
        self.model, self.world, self.device = model, world, device
        self.sharded = world.size > 1 and kind == "fsdp"
        whole = _Loss(model)
        if self.sharded:
            shard(whole, world, device, bf16)
        else:
            model.to(device)
        self._loss: nn.Module = whole
        if world.size > 1 and not self.sharded:
            newer = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # torch 2.13's name
            self._loss = DistributedDataParallel(
                whole,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **{"forward_sync_buffers" if newer else "broadcast_buffers": False},
            )

    def loss(self, inputs: dict[str, Any], labels: int | Tensor, blank: Tensor | None) -> Tensor:
        """This micro-batch's share of the global mean, times the number of processes: gradients are averaged.

        Args:
            inputs: the model's.
            labels: their number in the global batch, over all processes.
            blank: an image (1, 3, H, W) where the inputs hold none; None for a language model alone.
        """
        return self._loss(blank, **inputs, num_items_in_batch=labels / self.world.size, use_cache=False)

    def accumulating(self, last: bool) -> Any:
        """Around all micro-batches of a step but the last, for which gradients are not yet summed over processes.

        FSDP sums every time: what it would have to keep in between is a whole fp32 gradient on every GPU.
        """
        if isinstance(self._loss, DistributedDataParallel) and not last:
            return self._loss.no_sync()
        return nullcontext()

    def mean(self, loss: Tensor) -> Tensor:
        """The global loss from every process's sum of `loss` values."""
        if self.world.size > 1:
            dist.all_reduce(loss)
            loss = loss / self.world.size
        return loss


class _Loss(nn.Module):
    """From a micro-batch to its loss: what DDP wraps and the root of FSDP."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, blank: Tensor | None, **inputs: Any) -> Tensor:
        if blank is not None:
            # Into the embeddings, not onto the loss: so gradients, though zero, take the way that an image's take.
            nothing = 0.0 * self.model.get_image_features(blank).mean()
            inputs["inputs_embeds"] = self.model.get_input_embeddings()(inputs.pop("input_ids")) + nothing
        return self.model(**inputs).loss


def shard(whole: nn.Module, world: World, device: torch.device, bf16: bool) -> None:
    """Cuts parameters over all processes, block by block, in place.

    A_log, D and the dt bias of a block are cut apart from it: sharing its policy they would be gathered in bf16. They
    stay gathered from forward to backward (a few MB): gathering them again would cost a collective for each block.
    """
    mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("data",))
    # Inputs are left as they are: a residual stream in fp32 stays so.
    narrow = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    for module in whole.modules():
        if isinstance(module, SSMParameters):
            fully_shard(module, mesh=mesh, mp_policy=wide, reshard_after_forward=False)
    blocks = set(getattr(whole.model, "_no_split_modules", None) or ()) - {"VSS"}
    for module in list(whole.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=narrow)
    fully_shard(whole, mesh=mesh, mp_policy=narrow)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be cut; all processes must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
