"""Training steps as captured CUDA graphs: a small model's step is a thousand kernels, and launching them takes longer
than they do.

A graph works on fixed memory, a frame, which holds every batch that is no larger: surplus rows are padding, surplus
images belong to no placeholder, and neither has a gradient. Which frame a batch takes depends on the batch alone, and
so does what is computed: not on what came before, on where a run was cut, or on whether a graph stands for the kernels.

Shapes: B rows, L length, I images, H x W pixels, T labels.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmamba.data.collate import NO_LABEL, Batch
from vlmamba.models.prefill import Capture, as_graph

MOST = 4  # graphs of a run; batches of further sizes run kernel by kernel
Learn = Callable[[Batch, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """Rows, their length, images, labels; and whether rows are packed. Frames are told apart by it."""

    rows: int
    length: int
    images: int
    labels: int
    packed: bool

    @classmethod
    def of(cls, batch: Batch) -> Size:
        """The frame for a batch: rows, length of packed rows and images rounded up by an eighth at most.

        Labels are counted loosely: they cost little, and each batch has its own number.
        """
        rows, length = batch.input_ids.shape
        packed, images = batch.seq_idx is not None, 0 if batch.pixels is None else len(batch.pixels)
        rows, length = _rounded(rows), _rounded(length) if packed else length
        labels = 1 << (batch.num_labels + batch.num_labels // 4).bit_length()
        return cls(rows, length, _rounded(images), min(labels, rows * length), packed)

    def __str__(self) -> str:
        return f"{self.rows} x {self.length} tokens, {self.images} images, {self.labels} labels"


def _rounded(count: int) -> int:
    """Up to four binary digits and zeros."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


class Frame:
    """A batch's fixed memory on the device, and the graph that learns from it once there is one."""

    def __init__(self, size: Size, like: Batch, device: torch.device):
        rows = (size.rows, size.length)
        pixels = None if like.pixels is None else like.pixels.new_zeros(size.images, *like.pixels.shape[1:])
        self.size = size
        self.batch = replace(
            like,
            input_ids=like.input_ids.new_zeros(rows),
            labels=like.labels.new_full(rows, NO_LABEL),
            seq_idx=None if like.seq_idx is None else like.seq_idx.new_full(rows, -1),
            pixels=pixels,
            num_labels=size.labels,
        ).to(device)
        self.items = torch.zeros((), device=device)
        self.replay: Callable[[], tuple[Tensor, ...]] | None = None

    def fill(self, batch: Batch, labels: int) -> None:
        """Puts a batch that this frame is for in its place; `labels` is what its loss is divided by."""
        rows, length = batch.input_ids.shape
        for name, blank in (("input_ids", 0), ("labels", NO_LABEL), ("seq_idx", -1)):
            whole, given = getattr(self.batch, name), getattr(batch, name)
            if given is None:
                continue
            if whole.shape != given.shape:
                whole.fill_(blank)
            whole[:rows, :length].copy_(given, non_blocking=True)
        if self.batch.pixels is not None and batch.pixels is not None:
            self.batch.pixels[: len(batch.pixels)].copy_(batch.pixels, non_blocking=True)
            self.batch.pixels[len(batch.pixels) :].zero_()
        self.items.fill_(labels)


class CapturedStep:
    """Learns from whole batches through graphs.

    The first batch of a size is learned from kernel by kernel: that compiles what is not yet compiled and makes the
    optimiser's moments, so that no step need be thrown away. The second one is captured; a graph whose weights or
    moments have been replaced by others is captured anew.

    Args:
        learn: one optimiser step on a batch in device memory whose loss is divided by a number in device memory; gives
            (2,) loss and gradient norm. It must wait for nothing, and leave no gradients.
        optimizer: its rates are put into device memory, for `set_rates` to write to.
        capture: makes a function that does what a function does; a CUDA graph if not given.

    Raises:
        ValueError: the step holds something that no graph can stand for, such as a wait for the device.
    """

    def __init__(
        self, learn: Learn, optimizer: torch.optim.Optimizer, device: torch.device, capture: Capture | None = None
    ):
        self._learn, self._optimizer, self._device = learn, optimizer, device
        self._capture = capture or as_graph(device)
        self._frames: dict[Size, Frame] = {}
        self._signature: tuple[int, ...] = ()
        self.replayed = 0
        self._told: set[Size] = set()
        self._others = 0  # batches of sizes that have no graph
        for group in optimizer.param_groups:
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device).clone()

    def __call__(self, batch: Batch, labels: int) -> Tensor:
        """Loss and gradient norm (2,) of a step, in memory that the next step may overwrite."""
        size = Size.of(batch)
        frame = self._frames.get(size)
        new = frame is None
        if frame is None:
            frame = Frame(size, batch, self._device)
            if len(self._frames) < MOST:
                self._frames[size] = frame
        frame.fill(batch, labels)
        if new:
            self._others += size not in self._frames
            return self._learn(frame.batch, frame.items)
        if self._signature != (found := self._addresses()):
            self._signature = found
            for other in self._frames.values():
                other.replay = None
        if frame.replay is None:
            frame.replay = self._record(frame)
        self.replayed += 1
        return frame.replay()[0]

    def _record(self, frame: Frame) -> Callable[[], tuple[Tensor, ...]]:
        gc.collect()  # a dead graph of autograd's in a cycle would hold on to the stream that it was made on
        groups = self._optimizer.param_groups
        before = [group["capturable"] for group in groups]
        for group in groups:
            group["capturable"] = True
        try:
            return self._capture(lambda: (self._learn(frame.batch, frame.items),))
        except RuntimeError as problem:
            reason = str(problem).strip().split("\n")[0]
            raise ValueError(
                f"optim.capture: this model's step cannot be captured ({reason}); set it to false"
            ) from problem
        finally:
            for group, value in zip(groups, before, strict=True):
                group["capturable"] = value

    def _addresses(self) -> tuple[int, ...]:
        """Of all that a graph writes to and that could be replaced."""
        return tuple(
            tensor.data_ptr()
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            for tensor in (parameter, *self._optimizer.state[parameter].values())
        )

    def note(self) -> str | None:
        """For the log: new graphs, and steps that had none, since it was last asked; None without news."""
        graphs = {size for size, frame in self._frames.items() if frame.replay is not None}
        news = [f"captured: {size}" for size in graphs - self._told]
        if self._others:
            news.append(
                f"{self._others} steps kernel by kernel: batches of more than {MOST} sizes (rows x length, images); "
                "another optim.pack_into may give fewer"
            )
        self._told, self._others = graphs, 0
        return "; ".join(news) or None
