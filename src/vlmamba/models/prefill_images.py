"""Images on their way into a prompt: vision tower and connector as captured CUDA graphs.

A graph is captured for 1, 2, 4 and 8 images, at the second time that so many come; other numbers are put together from
these. What is captured are the modules themselves.

Shapes: I images, P visual tokens of an image, d model width.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlmamba.models import decode
from vlmamba.models.prefill import Capture, as_graph

MOST = 8  # images of a graph
KEPT = 8  # graphs of a model; the least recently used one goes
_PLAIN = ("vlmamba.models.", "torch.nn.modules.", "transformers.models.", "transformers.activations")
Features = Callable[[Tensor], Tensor]


def parts_of(images: int) -> list[int]:
    """The numbers of images, powers of two, of the graphs that read so many."""
    parts = [MOST] * (images // MOST)
    return parts + [1 << bit for bit in reversed(range(MOST.bit_length())) if (images % MOST) >> bit & 1]


class Frame:
    """Images of one number and size in fixed memory, and the graph that reads them."""

    def __init__(self, like: Tensor, capture: Capture):
        with torch.inference_mode(False):
            self.pixels = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self._capture, self._met = capture, False
        self._replay: Callable[[], tuple[Tensor, ...]] | None = None

    def run(self, pixels: Tensor, compute: Features) -> Tensor:
        """`compute` of the pixels (I, 3, H, W): features (I, P, d), in memory that the next images overwrite."""
        if not self._met:
            self._met = True
            return compute(pixels)
        self.pixels.copy_(pixels)
        if self._replay is None:
            self._replay = self._capture(lambda: (compute(self.pixels),))
        return self._replay()[0]


class ImageReader:
    """The frames of one VL-Mamba."""

    def __init__(self, parts: tuple[nn.Module, ...], capture: Capture | None = None):
        self.signature = _signature(parts)
        self._held = [p for part in parts for p in (*part.parameters(), *part.buffers())]  # graphs may read them
        self._capture = capture or as_graph(self._held[0].device)
        self.frames: OrderedDict[tuple[torch.Size, torch.dtype], Frame] = OrderedDict()

    def read(self, pixels: Tensor, compute: Features) -> Tensor:
        """Features (I, P, d) of pixels (I, 3, H, W), in memory of their own."""
        return torch.cat([self._frame(part).run(part, compute).clone() for part in pixels.split(parts_of(len(pixels)))])

    def _frame(self, pixels: Tensor) -> Frame:
        key = (pixels.shape, pixels.dtype)
        if key not in self.frames:
            while len(self.frames) >= KEPT:
                self.frames.popitem(last=False)
            self.frames[key] = Frame(pixels, self._capture)
        self.frames.move_to_end(key)
        return self.frames[key]


def refusal(parts: tuple[nn.Module, ...]) -> str | None:
    """Why tower and connector cannot be captured; None if they can: only what runs the same way every time can."""
    for part in parts:
        for name, module in part.named_modules():
            kind = type(module)
            if module.training:
                return f"{name or kind.__name__} is in training mode"
            if decode.has_hooks(module):
                return f"{name or kind.__name__} has hooks or a replaced forward"
            if not f"{kind.__module__}.".startswith(_PLAIN):
                return f"{name} is a {kind.__name__} (an adapter, or quantised)"
    return None


_readers: weakref.WeakKeyDictionary[nn.Module, ImageReader] = weakref.WeakKeyDictionary()
_told: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def read(model: nn.Module, pixels: Tensor, compute: Features) -> Tensor:
    """`compute` of pixels (I, 3, H, W), features (I, P, d), by graphs where they can stand for it.

    Args:
        model: whose `vision_tower` and `connector` `compute` calls, and nothing else.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not len(pixels):
        return compute(pixels)
    if not pixels.is_cuda:
        _readers.pop(model, None)
        return compute(pixels)
    if model.training or torch.is_autocast_enabled("cuda") or torch.cuda.is_current_stream_capturing():
        return compute(pixels)
    return _through_reader(model, pixels, compute)


def _through_reader(model: nn.Module, pixels: Tensor, compute: Features, capture: Capture | None = None) -> Tensor:
    parts = (model.get_submodule("vision_tower"), model.get_submodule("connector"))
    held = _readers.get(model)
    if held is not None:
        features = held.read(pixels, compute)
        if held.signature == _signature(parts) and refusal(parts) is None:  # looked at while the device works
            return features
        del _readers[model]
    reason = refusal(parts)
    if reason is None:
        held = _readers[model] = ImageReader(parts, capture)
        return held.read(pixels, compute)
    if "training mode" not in reason and _told.get(model) != reason:
        _told[model] = reason
        warnings.warn(f"images are read without a captured graph: {reason}", RuntimeWarning, stacklevel=4)
    return compute(pixels)


def _signature(parts: tuple[nn.Module, ...]) -> tuple[int, ...]:
    """Changes when a parameter or buffer is replaced. One that is written to is read anew by every replay."""
    return tuple(t.data_ptr() for part in parts for t in (*part.parameters(), *part.buffers()))
