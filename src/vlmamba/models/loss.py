"""Next-token cross-entropy that never holds the logits of a whole batch.

Shapes: B batch, L length, d width, T supervised positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CHUNK = 4096  # positions whose logits exist at one time: 0.8 GB in float32 at a vocabulary of 50,280


def next_token_loss(
    lm_head: nn.Module,
    hidden_BLd: Tensor,
    labels_BL: Tensor,
    seq_idx_BL: Tensor | None = None,
    num_items: Tensor | int | None = None,
    num_tokens: int | None = None,
    num_labels: int | None = None,
) -> Tensor:
    """Mean over the supervised positions of -log p(label), float32 scalar.

    Position t predicts the label at t + 1, never across a boundary of `seq_idx_BL`, nor in padding (below 0).
    Only positions with a label are projected to the vocabulary, in chunks whose logits are recomputed in the backward
    pass.

    Args:
        num_items: divides the sum instead of the number of labels here, so that accumulated or distributed batches
            weigh every token alike.
        num_tokens: rows of the head that stand for a token; padded rows above take no probability.
        num_labels: at least the number of supervised positions, where it is known: a GPU need then not be asked, and
            waited for. What is more than there are has no loss and no gradient.

    Raises:
        ValueError: `num_labels` is less than the number of labels (seen on the CPU alone).
    """
    targets = F.pad(labels_BL[:, 1:], (0, 1), value=-100)
    if seq_idx_BL is not None:
        crosses = F.pad(seq_idx_BL[:, 1:] != seq_idx_BL[:, :-1], (0, 1), value=True)
        targets = targets.masked_fill(crosses | (seq_idx_BL < 0), -100)
    chosen = (targets != -100).flatten()
    if num_labels is None:
        places_T = chosen.nonzero()[:, 0]
    else:
        _check_count(chosen, num_labels)
        places_T = chosen.nonzero_static(size=num_labels, fill_value=-1)[:, 0]
    nothing, places_T = places_T < 0, places_T.clamp(min=0)
    hidden_Td = hidden_BLd.flatten(0, 1).index_select(0, places_T)
    targets_T = targets.flatten()[places_T].masked_fill(nothing, -100)

    def chunk_loss(hidden: Tensor, target: Tensor) -> Tensor:
        logits = lm_head(hidden)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits[:, :num_tokens].to(wide), target, reduction="sum")

    if len(targets_T) <= _CHUNK:
        total = chunk_loss(hidden_Td, targets_T)
    else:
        total = hidden_BLd.new_zeros((), dtype=torch.promote_types(hidden_BLd.dtype, torch.float32))
        for hidden, target in zip(hidden_Td.split(_CHUNK), targets_T.split(_CHUNK), strict=True):
            # Nothing is drawn here; and a CUDA graph that is being captured cannot be asked for its generator's state.
            total = total + checkpoint(chunk_loss, hidden, target, use_reentrant=False, preserve_rng_state=False)
    return total / (num_items if num_items is not None else chosen.sum().clamp(min=1))


def _check_count(chosen: Tensor, num_labels: int) -> None:
    if type(chosen) is Tensor and chosen.device.type == "cpu" and int(chosen.sum()) > num_labels:
        raise ValueError(f"num_labels is {num_labels}, but {int(chosen.sum())} positions have a label to predict")
