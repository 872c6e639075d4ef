"""What the encoder of a VL-Mamba holds of a scene: linear probes on its patches.

    python studies/probe_encoder.py src/vlmamba/assets/nano --scenes 2400

An item is the mean of the patches under its box; a letter (first, middle and last of each word), the patch in its
middle. Four fifths of the items teach the probe, the last fifth is asked; the commonest answer stands beside it.

Letters: B scenes of a batch, P patches along a side, D width.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from vlmamba import VLMambaForConditionalGeneration, VLMambaProcessor
from vlmamba.data.scenes import World
from vlmamba.data.scenes.scene import Item

SEED, BATCH, SIDE = 424_242, 32, 128


@torch.inference_mode()
def collect(model: VLMambaForConditionalGeneration, processor: VLMambaProcessor, scenes: int) -> dict[str, list]:
    """Per question of the probe, pairs of a feature (D,) and its label."""
    world, found = World(SEED, "train"), defaultdict(list)
    for start in range(0, scenes, BATCH):
        indices = range(start, min(start + BATCH, scenes))
        pixels = np.stack([np.asarray(world.sample(i).image).transpose(2, 0, 1) for i in indices])
        patches, (rows, columns) = model.vision_tower(processor.normalise(torch.from_numpy(pixels)))
        patches_BPPD = patches.unflatten(1, (rows, columns))
        for patches_PPD, index in zip(patches_BPPD, indices, strict=True):
            for item in world.scene(index).items:
                for question, feature, label in probe_item(patches_PPD, item, SIDE // columns):
                    found[question].append((feature.clone(), label))
    return found


def probe_item(patches_PPD: Tensor, item: Item, patch: int) -> Iterator[tuple[str, Tensor, str]]:
    """Yields (question, feature, label) of one item of a scene."""
    left, top, right, bottom = (edge / patch for edge in item.box)
    under = patches_PPD[max(0, int(top)) : math.ceil(bottom), max(0, int(left)) : math.ceil(right)]
    if under.numel() and item.kind in ("thing", "shape"):
        feature = under.mean((0, 1))
        yield "name", feature, item.name
        if item.size:
            yield "size", feature, item.size
        if item.kind == "shape":
            yield "colour", feature, item.colour
            yield "fill", feature, item.fill
    if item.kind == "word":
        last = len(patches_PPD) - 1
        for place in (0, len(item.text) // 2, len(item.text) - 1):
            x = (item.box[0] + (place + 0.5) / len(item.text) * item.width) / patch
            at = patches_PPD[min(last, max(0, int(item.y / patch))), min(last, max(0, int(x)))]
            yield "letter", at, item.text[place].lower()


def accuracy(pairs: list) -> tuple[float, float, int]:
    """Of a linear probe and of the commonest answer, on the last fifth; and how many answers there are."""
    labels = sorted({label for _, label in pairs})
    y = torch.tensor([labels.index(label) for _, label in pairs])
    x = torch.stack([feature for feature, _ in pairs])
    x = (x - x.mean(0)) / (x.std(0) + 1e-5)
    known = len(y) * 4 // 5
    torch.manual_seed(0)
    probe = nn.Linear(x.shape[1], len(labels))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(60):
        for chosen in torch.randperm(known).split(512):
            loss = nn.functional.cross_entropy(probe(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = (probe(x[known:]).argmax(1) == y[known:]).float().mean().item()
    commonest = (y[known:] == y[:known].mode().values).float().mean().item()
    return right, commonest, len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of a VL-Mamba")
    parser.add_argument("--scenes", type=int, default=2400)
    options = parser.parse_args()
    model = VLMambaForConditionalGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    found = collect(model, VLMambaProcessor.from_pretrained(options.model), options.scenes)
    print("| | items | answers | linear probe | commonest answer |\n|---|---|---|---|---|")
    for question, pairs in found.items():
        right, commonest, answers = accuracy(pairs)
        print(f"| {question} | {len(pairs):,} | {answers} | {100 * right:.1f} % | {100 * commonest:.1f} % |")


if __name__ == "__main__":
    main()
