"""`vlmamba verify`: a Mamba and a vision encoder, ours against transformers', in float32.

The first contact with real weights: what differs is printed with what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vlmamba.commands.load import pick_device
from vlmamba.models.images import read_image
from vlmamba.models.processor import VLMambaProcessor
from vlmamba.models.weights import fetch, language_config, load_language, load_vision, read_config, read_tensors

_TEXT = "The cat sat on the mat. In the year 2024, a state space model read a long sequence, token by token, and"
# Largest difference over largest value. Rounding in float32, summed over 64 layers, stays below; a wrong weight, norm
# or layer is above 1e-2.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """Ours against theirs: the largest difference, and the largest value it is to be compared with."""

    what: str
    largest: float
    scale: float
    remedy: str

    @property
    def relative(self) -> float:
        return self.largest / max(self.scale, 1e-30)

    @property
    def fine(self) -> bool:
        return self.relative <= _TOLERANCE  # also false for NaN

    def __str__(self) -> str:
        verdict = "same" if self.fine else "DIFFERENT"
        return f"{verdict:10} {self.what}: largest difference {self.largest:.2e}, of values up to {self.scale:.2e}"


def verify(language: str, vision: str, image: str | None, text: str | None, device: str) -> int:
    """Prints every comparison; 0 when all agree, 1 when any differs.

    Raises:
        ValueError: a part that cannot be loaded, with the tensors that do not fit.
    """
    # transformers' warnings are about its own speed, and about weights of a text half that nobody asked for.
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = pick_device(device)
    picture = _drawn() if image is None else read_image(image)
    processor = VLMambaProcessor.from_parts(vision, language)
    print(f"language model {language}: {_count(language)}")
    found = list(_language(language, processor, text or _TEXT, place))
    print(f"vision encoder {vision}: {processor.num_image_tokens} tokens an image of {processor.image_size}")
    found += _vision(vision, processor, picture, place)
    wrong = [difference for difference in found if not difference.fine]
    for remedy in dict.fromkeys(difference.remedy for difference in wrong):
        print(f"what to do: {remedy}")
    if not wrong:
        print(
            "Both parts compute what transformers computes. Compose them with\n"
            f"  processor = VLMambaProcessor.from_parts({vision!r}, {language!r})\n"
            f"  model = VLMambaForConditionalGeneration.from_parts({vision!r}, {language!r},"
            " image_token_id=processor.image_token_id)"
        )
    return int(bool(wrong))


def _language(source: str, processor: VLMambaProcessor, text: str, device: torch.device) -> Iterator[Difference]:
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]], device=device)
    model, tokens = load_language(source)
    model = model.to(device).eval()
    if tokens is not None and len(processor.tokenizer) - 1 != tokens:
        print(f"note: the tokenizer has {len(processor.tokenizer) - 1} entries, the language model {tokens}")
    with torch.inference_mode():
        ours = model(ids).logits.cpu()
        half = ids.shape[1] // 2
        state = model(ids[:, :half], use_cache=True, logits_to_keep=1).cache_params
        rest = model(ids[:, half:], cache_params=state, use_cache=True).logits.cpu()
    del model, state  # one large model in memory at a time
    theirs = _their_logits(source, ids)
    rows = min(ours.shape[-1], theirs.shape[-1], tokens or ours.shape[-1])
    found = _compare(
        f"logits of {ids.shape[1]} tokens",
        ours[..., :rows],
        theirs[..., :rows],
        "the language model differs: report its config.json; until then use it through transformers",
    )
    yield _shown(found)
    yield _shown(
        _compare("the same, continued from a state", rest[..., :rows], ours[:, half:, :rows], "report this: a bug")
    )
    word = processor.tokenizer.decode([int(theirs[0, -1, :rows].argmax())])
    own = processor.tokenizer.decode([int(ours[0, -1, :rows].argmax())])
    print(f"{'':10} next word: ours {own!r}, transformers' {word!r}")


def _their_logits(source: str, ids: Tensor) -> Tensor:
    """transformers' MambaForCausalLM on the same weights, whatever their naming."""
    from transformers import MambaForCausalLM

    folder = fetch(source)
    config, _ = language_config(read_config(folder), source)
    model = MambaForCausalLM(config)
    tensors = {
        name.replace("backbone.embedding.", "backbone.embeddings."): tensor
        for name, tensor in read_tensors(folder).items()
    }
    missing, surplus = model.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if name != "lm_head.weight"]
    if missing or surplus:
        raise ValueError(f"{source} does not fit transformers' Mamba: missing {missing[:5]}, surplus {surplus[:5]}")
    model.tie_weights()
    with torch.inference_mode():
        return model.to(ids.device).eval()(ids, use_cache=False).logits.cpu()


def _vision(
    source: str, processor: VLMambaProcessor, picture: Image.Image, device: torch.device
) -> Iterator[Difference]:
    tower = load_vision(source).to(device).eval()
    pixels = processor(images=picture, return_tensors="pt").pixel_values.to(device)
    with torch.inference_mode():
        ours, grid = tower(pixels)
        ours = ours.cpu()
    kind = type(tower.model)
    patches = grid[0] * grid[1]
    model = kind.from_pretrained(fetch(source), dtype=torch.float32).to(device).eval()
    with torch.inference_mode():
        theirs = model(pixels, output_hidden_states=True).hidden_states[tower.layer][:, -patches:].cpu()
    remedy = (
        "the vision encoder differs: check that transformers loads it without warnings, then report its config.json"
    )
    yield _shown(_compare(f"{patches} patches of layer {tower.layer}", ours, theirs, remedy))


def _compare(what: str, ours: Tensor, theirs: Tensor, remedy: str) -> Difference:
    difference = (ours.double() - theirs.double()).abs().max().item()
    return Difference(what, difference, theirs.double().abs().max().item(), remedy)


def _shown(difference: Difference) -> Difference:
    print(difference, flush=True)
    return difference


def _count(source: str) -> str:
    config: dict[str, Any] = read_config(Path(fetch(source)))
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    return f"{layers} layers, width {config.get('hidden_size', config.get('d_model'))}"


def _drawn() -> Image.Image:
    """A picture with edges, colours and slopes, the same everywhere."""
    image = Image.linear_gradient("L").convert("RGB").resize((400, 300))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 50, 180, 190), fill=(220, 40, 30))
    draw.rectangle((230, 90, 350, 250), fill=(30, 60, 200))
    return image
