"""Decoding on the CPU: every one-token continuation in one native call, the states advanced where they lie.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmamba.models.state import MambaState
from vlmamba.ops.decode import Head, Layer, cpu


class HostDecoder:
    """The fused weights of a causal LM on the CPU.

    Args:
        layers, head: see `models.decode.fused_weights`. float32 weights that are all bfloat16 numbers are read as such,
            which changes no result and halves the time.
        signature: of the parameters they were made from.
        threads: how many; whatever is fastest if not given.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        head: Head,
        signature: tuple[tuple[int, int], ...] = (),
        threads: int | None = None,
    ):
        with torch.inference_mode(False):
            self._token = cpu.Token(*cpu.compact(layers, head), threads)
        self.signature = signature
        self.checked = True

    def logits(self, tokens: Tensor, state: MambaState) -> Tensor:
        """Logits (B, V) float32 after one token per row (B,), B <= HOST_ROWS. The state moves on in place."""
        conv, ssm = self._settled(state)
        return self._token.logits(tokens, conv, ssm)

    def _settled(self, state: MambaState) -> tuple[list[Tensor], list[Tensor]]:
        """The state's tensors, in the form the native code takes; those that were not are replaced in the state."""
        conv, ssm = ([t for t in held if t is not None] for held in (state.conv, state.ssm))
        kind = torch.bfloat16 if conv[0].dtype == torch.bfloat16 else torch.float32
        fits = all(t.dtype == kind and t.is_contiguous() for t in conv)
        if not fits or not all(t.dtype == torch.float32 and t.is_contiguous() for t in ssm):
            conv, ssm = [t.to(kind).contiguous() for t in conv], [t.float().contiguous() for t in ssm]
            state.conv, state.ssm = list(conv), list(ssm)
        return conv, ssm

    def release(self) -> None:
        """Nothing is held: states live with their owners."""
