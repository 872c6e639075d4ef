"""One optimiser step over a global batch: the part of training that knows nothing of loops, files or logs.

Shapes: B rows, L length, I images, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vlmamba.data.collate import NO_LABEL, Batch
from vlmamba.models.prefill import Capture
from vlmamba.training.captured import CapturedStep
from vlmamba.training.parallel import Parallel, World, full


@dataclass(frozen=True)
class Tally:
    """What a global batch holds, over all processes.

    Attributes:
        labels: supervised tokens; tokens: all tokens that were read, padding apart; slots: padding included.
        samples: those that could be used; skipped: those that could not.
    """

    labels: int
    tokens: int
    slots: int
    images: int
    samples: int
    skipped: int

    @classmethod
    def of(cls, micro_batches: list[Batch], world: World) -> Tally:
        """Counts this process's micro-batches and adds what the others have; all must count together."""
        rows = [
            (
                batch.num_labels,
                batch.num_tokens,
                batch.input_ids.numel(),
                0 if batch.pixels is None else len(batch.pixels),
                len(batch.ids),
                len(batch.skipped),
            )
            for batch in micro_batches
        ]
        return cls(*map(int, world.sum([sum(column) for column in zip(*rows, strict=True)] if rows else [0] * 6)))


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        numbers: (2,) float32 on the CPU, on its way there until `ready`: the loss (token-weighted mean over the global
            batch) and the gradient norm of all trained parameters before clipping. `read` waits for them.
        tally: what it was given.
    """

    numbers: Tensor
    ready: torch.cuda.Event | None
    tally: Tally

    def read(self) -> tuple[float, float]:
        """Loss and gradient norm; waits for this step alone, not for what the device was given since."""
        if self.ready is not None:
            self.ready.synchronize()
        loss, grad_norm = self.numbers.tolist()
        return loss, grad_norm


_STAND_IN = torch.zeros(1, 2, dtype=torch.int64)


class Step:
    """Forward, backward and update.

    Accumulation is exact: every micro-batch's summed loss is divided by the labels of the whole global batch, so how
    a batch is cut, and over how many processes, makes no difference.

    Args:
        model: called with input_ids, labels, pixel_values, seq_idx, num_items_in_batch; gives `.loss`.
        normalise: uint8 pixels (I, 3, H, W) on the device to what the vision tower expects.
        bf16: autocast on CUDA; the CPU computes in float32.
        parallel: the model as this process of several holds it; None: there is one.
        capture: replay CUDA graphs of whole steps; global batches are then one micro-batch, and there is one process.
            A function that stands for `models.prefill.as_graph` serves too, on any device.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        normalise: Callable[[Tensor], Tensor],
        grad_clip: float,
        bf16: bool,
        parallel: Parallel | None = None,
        capture: bool | Capture = False,
    ):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.normalise, self.grad_clip = normalise, grad_clip
        self.autocast = bf16 and device.type == "cuda"
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.parallel = parallel or Parallel(model, World(), device)
        tower = getattr(model, "vision_tower", None)
        self.image_size: int | None = None if tower is None else tower.image_size
        self.counts_labels = "num_labels" in signature(model.forward).parameters
        self.captured: CapturedStep | None = None
        if capture:
            self.captured = CapturedStep(self._learn, optimizer, device, None if capture is True else capture)

    def count(self, micro_batches: list[Batch]) -> Tally:
        """What all processes hold of a global batch."""
        return Tally.of(micro_batches, self.parallel.world)

    def __call__(self, micro_batches: list[Batch], tally: Tally | None = None) -> StepResult:
        """One step over this process's share of a global batch; `tally` is `count` of it, where it is known."""
        tally = tally or self.count(micro_batches)
        if tally.labels == 0:
            raise ValueError("no sample of this batch has anything to learn from; see skipped.jsonl in the run folder")
        if self.parallel.world.size == 1:
            micro_batches = [batch for batch in micro_batches if batch.num_labels]
        if self.captured is not None and len(micro_batches) == 1:
            self._check_images(micro_batches[0])
            computed = self.captured(micro_batches[0], tally.labels)
        else:
            computed = self._cut(micro_batches, tally.labels)
        numbers, ready = self._send(computed)
        return StepResult(numbers=numbers, ready=ready, tally=tally)

    def _cut(self, micro_batches: list[Batch], labels: int) -> Tensor:
        """A step over micro-batches: loss and gradient norm (2,)."""
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, 1):
            with self.parallel.accumulating(last=number == len(micro_batches)):
                loss += self._accumulate(batch, labels)
        return self._update(self.parallel.mean(loss))

    def _learn(self, batch: Batch, labels: Tensor) -> Tensor:
        """The same over one batch, checked and on the device, without a look at what it holds."""
        return self._update(self._derive(self._keywords(batch), labels, self._blank(batch)))

    def _accumulate(self, batch: Batch, labels: int) -> Tensor:
        return self._derive(self.inputs(batch), labels, self._blank(batch))

    def _derive(self, inputs: dict[str, Any], labels: int | Tensor, blank: Tensor | None) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            loss = self.parallel.loss(inputs, labels, blank)
        loss.backward()
        return loss.detach()

    def _update(self, loss: Tensor) -> Tensor:
        grad_norm = full(torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip or torch.inf))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss, grad_norm.detach()])

    def _blank(self, batch: Batch) -> Tensor | None:
        """Encoder and connector take part in every micro-batch: other processes wait for them, and a stage that trains
        the connector alone would have nothing to derive."""
        if self.image_size is None or batch.pixels is not None:
            return None
        return torch.zeros(1, 3, self.image_size, self.image_size, device=self.device)

    def _send(self, numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy on the CPU and the event that says it has arrived."""
        if self.device.type != "cuda":
            return numbers.cpu(), None
        arrived, ready = torch.empty_like(numbers, device="cpu", pin_memory=True), torch.cuda.Event()
        arrived.copy_(numbers, non_blocking=True)
        ready.record()
        return arrived, ready

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's keyword arguments. Padding stands on the right, out of sight of a causal model, so there is no
        mask: its labels are -100. A micro-batch that holds nothing (all its samples were bad, and other processes wait
        for this one) is two tokens without a label."""
        if not batch.input_ids.numel():
            batch = replace(batch, input_ids=_STAND_IN, labels=torch.full_like(_STAND_IN, NO_LABEL), seq_idx=None)
        self._check_images(batch)
        return self._keywords(batch.to(self.device))

    def _keywords(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "labels": batch.labels}
        if self.counts_labels:
            inputs["num_labels"] = batch.num_labels
        if batch.seq_idx is not None:
            inputs["seq_idx"] = batch.seq_idx
        if batch.pixels is not None:
            inputs["pixel_values"] = self.normalise(batch.pixels)
        return inputs

    def _check_images(self, batch: Batch) -> None:
        """Here, on the CPU, for the model does not look: ValueError if placeholders and images do not fit."""
        if not self.counts_labels or self.image_size is None:
            return
        images = 0 if batch.pixels is None else len(batch.pixels)
        expected = images * self.model.vision_tower.num_tokens
        placeholders = int((batch.input_ids == self.model.config.image_token_id).sum())
        if placeholders != expected:
            raise ValueError(
                f"a micro-batch holds {placeholders} image placeholders, its {images} images give {expected} visual "
                f"tokens; samples: {', '.join(batch.ids)[:500]}"
            )
