"""Gradients of inputs that need not be given: a torch op cannot return None, so inside it theirs is an empty tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def none_as_empty(x: Tensor, found: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What an implementation's backward gives, as an op may return it; empty ones are like `x`."""
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in found)


def like(inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Tensors of the shapes and dtypes that the op returns for these inputs; the first is always given."""
    return none_as_empty(inputs[0], [None if value is None else value.new_empty(value.shape) for value in inputs])


def of_given(inputs: Sequence[Tensor | None], found: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What autograd takes of the op's gradients: None again for the inputs that were not given."""
    return tuple(None if value is None else gradient for value, gradient in zip(inputs, found, strict=True))
