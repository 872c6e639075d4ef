"""Sum and root-mean-square norm in plain torch, for any device and dtype; autograd sees through it.

Legend: ... leading dimensions, d model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """norm(x + delta) (..., d) in `dtype`, and x + delta in x's dtype (empty without a delta)."""
    summed = x if delta is None else (x + delta).to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(summed.to(wide), weight.shape, weight.to(wide), eps).to(dtype)
    return normed, x.new_empty(0) if delta is None else summed
