"""One optimiser step over a global batch: the part of training that knows nothing of loops, files or logs.

Shapes: B rows, L length, I images, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmamba.data.collate import Batch


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        numbers: (2,) float32 on the CPU, on its way there until `ready`: the loss (token-weighted mean over the global
            batch) and the gradient norm of all trained parameters before clipping. `read` waits for them.
        labels: supervised tokens; tokens: all tokens that were read, padding apart; slots: padding included.
    """

    numbers: Tensor
    ready: torch.cuda.Event | None
    labels: int
    tokens: int
    slots: int
    images: int

    def read(self) -> tuple[float, float]:
        """Loss and gradient norm; waits for this step alone, not for what the device was given since."""
        if self.ready is not None:
            self.ready.synchronize()
        loss, grad_norm = self.numbers.tolist()
        return loss, grad_norm


class Step:
    """Forward, backward and update.

    Accumulation is exact: every micro-batch's summed loss is divided by the labels of the whole global batch, so how
    a batch is cut makes no difference.

    Args:
        model: called with input_ids, labels, pixel_values, seq_idx, num_items_in_batch; gives `.loss`.
        normalise: uint8 pixels (I, 3, H, W) on the device to what the vision tower expects.
        bf16: autocast on CUDA; the CPU computes in float32.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        normalise: Callable[[Tensor], Tensor],
        grad_clip: float,
        bf16: bool,
    ):
        self.model, self.optimizer, self.device = model, optimizer, device
        self.normalise, self.grad_clip = normalise, grad_clip
        self.autocast = bf16 and device.type == "cuda"
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, micro_batches: list[Batch]) -> StepResult:
        labels = sum(batch.num_labels for batch in micro_batches)
        if labels == 0:
            raise ValueError("no sample of this batch has anything to learn from; see skipped.jsonl in the run folder")
        loss = torch.zeros((), device=self.device)
        for batch in micro_batches:
            if batch.num_labels:
                loss += self._accumulate(batch, labels)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip or torch.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        numbers, ready = self._send(torch.stack([loss, grad_norm.detach()]))
        return StepResult(
            numbers=numbers,
            ready=ready,
            labels=labels,
            tokens=sum(batch.num_tokens for batch in micro_batches),
            slots=sum(batch.input_ids.numel() for batch in micro_batches),
            images=sum(len(batch.pixels) for batch in micro_batches if batch.pixels is not None),
        )

    def _accumulate(self, batch: Batch, labels: int) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext():
            loss = self.model(**self.inputs(batch), num_items_in_batch=labels, use_cache=False).loss
        loss.backward()
        return loss.detach()

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
        mask: its labels are -100."""
        batch = batch.to(self.device)
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "labels": batch.labels}
        if batch.seq_idx is not None:
            inputs["seq_idx"] = batch.seq_idx
        if batch.pixels is not None:
            inputs["pixel_values"] = self.normalise(batch.pixels)
        return inputs
