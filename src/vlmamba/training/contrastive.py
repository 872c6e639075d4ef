"""A vision encoder that is trained alone on pictures and texts that belong together.

As CLIP (arXiv 2103.00020): which of the batch's texts is this picture's, and the reverse. Or as SigLIP (arXiv
2303.15343): of every pair of a picture and a text, whether it is one.

Letters: B pictures and their texts, L ids of a row, T text ids, P patches, D width of the encoder, E of the embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmamba.data.collate import NO_LABEL
from vlmamba.models.vision import VisionTower

MOST = 192
"""Ids of a text that are read."""
_MEMORY = 0.98  # as in training/patches.py: the accuracy is of the last fifty batches


@dataclass(frozen=True)
class ContrastiveOutput:
    """loss: mean over the batch; logits: (B, B), pictures by texts."""

    loss: Tensor
    logits: Tensor


class TextTower(nn.Module):
    """A small Transformer over T ids, mean of what it gives at the text's places: (B, T), (B, T) to (B, width)."""

    def __init__(self, vocabulary: int, width: int = 256, blocks: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(torch.empty(MOST, width))
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places, std=0.02)
        block = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, blocks, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, ids_BT: Tensor, is_text_BT: Tensor) -> Tensor:
        read = is_text_BT.clone()
        read[:, 0] = True  # a row without text, which counts for nothing, has to look at something
        hidden = self.blocks(
            self.words(ids_BT * is_text_BT) + self.places[: ids_BT.shape[1]], src_key_padding_mask=~read
        )
        return (hidden * read[..., None]).sum(1) / read.sum(1, keepdim=True)


class ContrastivePairs(nn.Module):
    """A vision tower, the mean of whose patches is drawn to the embedding of the picture's text.

    The text tower and both projections are thrown away; what is kept is the tower, as from `patches.PatchReader`.
    Called as any model of a step is: `input_ids` are a picture's P placeholders and its text, `labels` mark the text.
    The loss is a mean over the pictures of one micro-batch, which therefore has to be the whole batch. Texts that two
    pictures share count for neither as the other's.
    """

    _no_split_modules = ("CLIPEncoderLayer", "SiglipEncoderLayer")

    def __init__(self, vision_tower: VisionTower, vocabulary: int, kind: Literal["softmax", "sigmoid"]) -> None:
        super().__init__()
        self.vision_tower, self.kind = vision_tower, kind
        text, width = TextTower(vocabulary), vision_tower.hidden_size
        # Both papers' own first values.
        scale, bias = (math.log(10.0), -10.0) if kind == "sigmoid" else (math.log(1 / 0.07), 0.0)
        self.heads = nn.ModuleDict(
            {
                "text": text,
                "from_picture": nn.Linear(width, width, bias=False),
                "from_text": nn.Linear(text.words.embedding_dim, width, bias=False),
                "scale": _Number(scale),
                "bias": _Number(bias),
            }
        )
        self.register_buffer("found", torch.zeros(3), persistent=False)
        """Of late: texts rightly found for pictures, pictures for texts, and how many were asked for."""

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor,
        input_ids: Tensor,
        num_items_in_batch: Tensor | float | None = None,
        use_cache: bool = False,
    ) -> ContrastiveOutput:
        """Pixels (B, 3, H, W), ids and labels (B, L). `num_items_in_batch` counts words; this loss counts pictures."""
        first = self.vision_tower.num_tokens
        ids_BT, is_text_BT = input_ids[:, first : first + MOST], labels[:, first : first + MOST] != NO_LABEL
        pictures = self.heads["from_picture"](self.vision_tower(pixel_values)[0].mean(1))
        texts = self.heads["from_text"](self.heads["text"](ids_BT, is_text_BT))
        with torch.autocast(pictures.device.type, enabled=False):
            pictures_BE, texts_BE = (functional.normalize(x.float(), dim=-1) for x in (pictures, texts))
            scale = self.heads["scale"]().clamp(max=math.log(100.0)).exp()
            logits_BB = scale * pictures_BE @ texts_BE.T + self.heads["bias"]()
            loss = self._loss(logits_BB, ids_BT * is_text_BT, is_text_BT.any(1))
        return ContrastiveOutput(loss, logits_BB)

    def _loss(self, logits_BB: Tensor, words_BT: Tensor, there_B: Tensor) -> Tensor:
        """`there`: rows that hold a pair; the others pad the batch."""
        own = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
        alike = (words_BT[:, None] == words_BT[None]).all(-1) & ~own
        counted = there_B[:, None] & there_B[None] & ~alike
        wanted = torch.arange(len(logits_BB), device=logits_BB.device).masked_fill(~there_B, NO_LABEL)
        among = logits_BB.masked_fill(~counted & ~own, -torch.inf)
        if self.training:
            right = [(of.argmax(1) == wanted).sum() for of in (among.detach(), among.detach().T)]
            self.found.mul_(_MEMORY).add_(torch.stack([*right, there_B.sum()]))
        if self.kind == "softmax":
            return sum(functional.cross_entropy(of, wanted, ignore_index=NO_LABEL) for of in (among, among.T)) / 2
        signs = 2.0 * own - 1.0
        return -(functional.logsigmoid(signs * logits_BB) * counted).sum() / there_B.sum()

    def notes(self) -> str:
        """For the log: how often the right one of the batch is found."""
        texts, pictures, asked = self.found.tolist()
        share = [found / max(asked, 1.0) for found in (texts, pictures)]
        return f"found in its batch: a picture's text {share[0]:.1%}, a text's picture {share[1]:.1%}"


class _Number(nn.Module):
    """One learned number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(value))  # by this name, and so without weight decay

    def forward(self) -> Tensor:
        return self.bias
