"""The recurrent state of a Mamba language model: all that it remembers of a sequence, whatever the length.

Shapes: S slots (sequences), D channels, N state size, W convolution width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class MambaState:
    """Convolution and SSM state of every layer, for a batch of sequences ("slots").

    Attributes:
        conv: per layer, the last W-1 inputs of the convolution, oldest first: (S, W-1, D), dtype of the activations.
            None stands for the start of a sequence (all zero).
        ssm: per layer, the state of the recurrence: (S, D, N), float32. None as above.

    A forward pass that is given a state continues from it and updates it in place; `clone` first to branch.
    transformers' `generate` carries it as `cache_params`.
    """

    # What transformers' generation asks of a cache.
    is_compileable = False
    _is_user_defined = False

    def __init__(self, conv: Sequence[Tensor | None], ssm: Sequence[Tensor | None]):
        if len(conv) != len(ssm):
            raise ValueError(f"a state needs one conv and one ssm tensor per layer, got {len(conv)} and {len(ssm)}")
        self.conv = list(conv)
        self.ssm = list(ssm)

    @classmethod
    def empty(cls, num_layers: int) -> MambaState:
        """The state before the first token; tensors are made by the first forward pass, on its device."""
        return cls([None] * num_layers, [None] * num_layers)

    @classmethod
    def zeros(
        cls,
        num_layers: int,
        slots: int,
        channels: int,
        state_size: int,
        conv_kernel: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> MambaState:
        """The state before the first token, with memory already taken (for pools and captured graphs)."""
        conv_shape, ssm_shape = (slots, conv_kernel - 1, channels), (slots, channels, state_size)
        return cls(
            [torch.zeros(conv_shape, dtype=dtype, device=device) for _ in range(num_layers)],
            [torch.zeros(ssm_shape, dtype=torch.float32, device=device) for _ in range(num_layers)],
        )

    @property
    def num_layers(self) -> int:
        return len(self.ssm)

    @property
    def slots(self) -> int | None:
        """Number of sequences, or None before the first token."""
        return None if self.ssm[0] is None else self.ssm[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.conv, *self.ssm) if t is not None)

    def update(self, layer: int, conv_SWD: Tensor, ssm_SDN: Tensor) -> None:
        """Takes a layer's new state. Memory held is reused, except where autograd needs the old values."""
        self.conv[layer] = _renew(self.conv[layer], conv_SWD)
        self.ssm[layer] = _renew(self.ssm[layer], ssm_SDN)

    def gather(self, slots: Tensor) -> MambaState:
        """A new state of the chosen slots, in the order of `slots` (any length, repeats allowed)."""
        return self._map(lambda t: t.index_select(0, slots.to(t.device)))

    def clone(self) -> MambaState:
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> MambaState:
        return self._map(lambda t: t.to(device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the slots in place (beam search)."""
        chosen = self.gather(beam_idx)
        self.conv, self.ssm = chosen.conv, chosen.ssm

    def save(self, path: str | Path) -> None:
        """Writes the state as safetensors."""
        if self.slots is None:
            raise ValueError("the state is empty: nothing has been read yet, so there is nothing to save")
        named = {f"conv.{i}": t for i, t in enumerate(self.conv)} | {f"ssm.{i}": t for i, t in enumerate(self.ssm)}
        save_file({name: t.contiguous() for name, t in named.items() if t is not None}, path)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> MambaState:
        """Reads a state written by `save`."""
        named = load_file(path, device=device)
        layers = range(len(named) // 2)
        missing = [f"{part}.{i}" for part in ("conv", "ssm") for i in layers if f"{part}.{i}" not in named]
        if missing or len(named) % 2 or not named:
            raise ValueError(f"{path} is not a saved MambaState: {len(named)} tensors, missing {missing}")
        return cls([named[f"conv.{i}"] for i in layers], [named[f"ssm.{i}"] for i in layers])

    def _map(self, change) -> MambaState:  # type: ignore[no-untyped-def]
        def every(tensors: list[Tensor | None]) -> list[Tensor | None]:
            return [None if t is None else change(t) for t in tensors]

        return MambaState(every(self.conv), every(self.ssm))

    def __repr__(self) -> str:
        return f"MambaState(layers={self.num_layers}, slots={self.slots}, {self.nbytes / 2**20:.1f} MiB)"


def _renew(old: Tensor | None, new: Tensor) -> Tensor:
    if old is None or old.shape != new.shape or new.requires_grad or old.requires_grad:
        return new
    return old.copy_(new)
