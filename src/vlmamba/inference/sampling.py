"""Drawing tokens: every row by its own temperature, top-k, top-p and chance.

A row's token depends on its logits and on its own random number alone.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmamba.inference.request import Sampling


def draw(logits_BV: Tensor, how: Sequence[Sampling], chances: Sequence[float]) -> Tensor:
    """One token a row, (B,) int64. chances: (B,) in [0, 1), looked at where the temperature is above 0."""
    tokens = logits_BV.argmax(-1)
    rows = [row for row, sampling in enumerate(how) if sampling.temperature > 0]
    if not rows:
        return tokens
    where = to_device(rows, logits_BV.device, torch.int64)
    drawn = _drawn(logits_BV.index_select(0, where), [how[row] for row in rows], [chances[row] for row in rows])
    return tokens.index_copy(0, where, drawn)


def to_device(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor (n,) there; the device is not waited for, as it is where memory is not pinned."""
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def _drawn(logits_BV: Tensor, how: Sequence[Sampling], chances: Sequence[float]) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return to_device(values, logits_BV.device, torch.float64)[:, None]

    ranked, tokens = logits_BV.double().sort(dim=-1, descending=True, stable=True)
    # Below the best, so that no temperature, however low, makes an infinity.
    shares = torch.softmax((ranked - ranked[:, :1]) / column([s.temperature for s in how]), -1)
    before = shares.cumsum(-1) - shares
    places = torch.arange(shares.shape[1], device=shares.device)
    kept = (before < column([s.top_p for s in how])) & (places < column([s.top_k or len(places) for s in how]))
    kept[:, 0] = True
    sums = (shares * kept).cumsum(-1)
    # Of the tokens kept, the first at which the sum passes the chance. A chance below 1 is below the last sum, but for
    # rounding; then the last one kept.
    place = (sums <= column(chances) * sums[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(1, place.minimum(kept.sum(-1, keepdim=True) - 1))[:, 0]
