"""A vision encoder that is trained alone: it tells of every patch of a scene what lies there.

Letters: B pictures, F fields, P patches, C classes of all fields together, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmamba.data.collate import NO_LABEL
from vlmamba.data.scenes import FIELDS
from vlmamba.models.vision import VisionTower

EMPTY = 0.1
"""Weight of "nothing". Of a picture's 256 patches about 31 hold anything and 9 a middle: with a tenth of their weight
the empty ones count about as much as the others, and telling both apart is not all that is learned."""
_MEMORY = 0.98  # how much of the counts stays from one micro-batch to the next: the accuracy is of the last fifty


@dataclass(frozen=True)
class PatchOutput:
    """loss: of the labels given; logits: (B, P, C), field after field."""

    loss: Tensor
    logits: Tensor


class PatchReader(nn.Module):
    """A vision tower and one linear head a field (`vlmamba.data.scenes.FIELDS`) on its tokens.

    The heads are thrown away: what they can read, a connector can. Called as any model of a step is; labels are
    (B, 1 + F P): one of no meaning, then the class of every patch, field by field.
    """

    _no_split_modules = ("CLIPEncoderLayer", "SiglipEncoderLayer")

    def __init__(self, vision_tower: VisionTower) -> None:
        super().__init__()
        self.vision_tower = vision_tower
        self.sizes = [len(classes) for classes in FIELDS.values()]
        self.heads = nn.Linear(vision_tower.hidden_size, sum(self.sizes))
        weights = torch.ones(max(self.sizes))
        weights[0] = EMPTY
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("right_of", torch.zeros(len(FIELDS), 2, 2), persistent=False)
        """(F, 2, 2): of patches where there is nothing and where there is something, how many were right, and all."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor,
        input_ids: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        use_cache: bool = False,
    ) -> PatchOutput:
        """Summed cross-entropy over fields and patches, divided by `num_items_in_batch` (by default all labels)."""
        tokens_BPD, _ = self.vision_tower(pixel_values)
        logits_BPC = self.heads(tokens_BPD)
        wanted_FBP = labels[:, 1:].unflatten(1, (len(FIELDS), -1)).unbind(1)
        loss = logits_BPC.new_zeros((), dtype=torch.float32)
        counts = []
        for logits, wanted in zip(logits_BPC.split(self.sizes, -1), wanted_FBP, strict=True):
            flat = logits.flatten(0, 1).float()
            weight = self.weights[: flat.shape[1]]
            loss = loss + functional.cross_entropy(flat, wanted.flatten(), weight, reduction="sum")
            counts.append(_count(logits.detach(), wanted))
        if self.training:
            self.right_of.mul_(_MEMORY).add_(torch.stack(counts))
        items = (labels != NO_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
        return PatchOutput(loss / items, logits_BPC)

    def notes(self) -> str:
        """For the log: how much of what was lately seen is told rightly."""
        right, total = self.right_of.sum(0)[0].tolist()
        found = ((of[1, 0] / of[1, 1].clamp(min=1)).item() for of in self.right_of)
        fields = ", ".join(f"{field} {share:.1%}" for field, share in zip(FIELDS, found, strict=True))
        return f"right where something is: {fields}; where nothing is: {right / max(total, 1):.2%}"


def _count(logits_BPC: Tensor, wanted_BP: Tensor) -> Tensor:
    """(2, 2): right and all, of patches with nothing and with something."""
    right, there = logits_BPC.argmax(-1) == wanted_BP, wanted_BP > 0
    return torch.stack([torch.stack([(right & of).sum(), of.sum()]) for of in (~there, there)]).float()
