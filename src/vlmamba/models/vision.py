"""Vision towers behind one contract: pixels in, patch vectors and their grid out.

A tower is transformers' own CLIP or SigLIP vision model, cut off after the chosen block. Parameter names below
`model.` are transformers', so any checkpoint of either loads without translation.

Letters: B images, H and W pixels, h and w patches (rows, columns), P tokens (h * w, plus one with CLS), D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# What a vision checkpoint holds beside the part that a cut tower keeps: the text half and heads of a full CLIP or
# SigLIP, the pooling head, later blocks. Such keys are left out on purpose; any other surplus key is an error.
_OTHER_PARTS = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
_CUT_PARTS = ("post_layernorm.", "head.", "encoder.layers.", "embeddings.position_ids")


class VisionTower(nn.Module):
    """A CLIP or SigLIP vision encoder up to one of its layers.

    Args:
        config: a transformers `CLIPVisionConfig` or `SiglipVisionConfig`.
        layer: which of transformers' `hidden_states` is given out: 0 the embeddings, n the output of block n, negative
            from the end (-2, LLaVA's choice: the output of the second-to-last block). The last layer is transformers'
            `last_hidden_state`, which SigLIP passes through its post-layernorm and CLIP does not. Blocks after the
            chosen one are not built.
        cls: keep CLIP's CLS token, first among the tokens. SigLIP has none.
    """

    def __init__(self, config: Any, layer: int = -2, cls: bool = False) -> None:
        super().__init__()
        kind = _kind(config)
        total = config.num_hidden_layers
        if not -total - 1 <= layer <= total:
            raise ValueError(
                f"vision_layer={layer} does not exist: this {kind} encoder has {total} blocks, so layers "
                f"{-total - 1} to {total} (0 is the embedding; -2 the second-to-last block)"
            )
        if cls and kind == "siglip":
            raise ValueError("vision_cls=True, but SigLIP has no CLS token; take vision_cls=False or a CLIP encoder")
        self.layer = layer % (total + 1)
        self.cls = cls
        self.hidden_size: int = config.hidden_size
        self.patch_size: int = _single(config.patch_size, "patch_size")
        self.image_size: int = _single(config.image_size, "image_size")
        self.config = config
        self._first_patch = 1 if kind == "clip" and not cls else 0
        self.model = _cut_model(kind, config, self.layer)
        self._normalise_output = kind == "siglip" and self.layer == total

    @property
    def num_tokens(self) -> int:
        """Tokens per image of the encoder's own size, CLS included where it is kept."""
        height, width = self.grid(self.image_size, self.image_size)
        return height * width + int(self.cls)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image of `height` x `width` pixels; what is over at the edges is cut."""
        if height < self.patch_size or width < self.patch_size:
            raise ValueError(f"an image of {height} x {width} pixels is smaller than one patch of {self.patch_size}")
        return height // self.patch_size, width // self.patch_size

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pixels (B, 3, H, W), normalised by the image processor -> tokens (B, P, D) in row-major order, and (h, w).

        Images of another size than the encoder's own, rectangular ones too, take interpolated position embeddings.
        """
        if pixels_BCHW.ndim != 4:
            raise ValueError(f"pixel_values must be (images, 3, height, width); got shape {tuple(pixels_BCHW.shape)}")
        height, width = pixels_BCHW.shape[-2:]
        grid = self.grid(height, width)
        foreign_size = (height, width) != (self.image_size, self.image_size)
        hidden_BPD = self.model.embeddings(pixels_BCHW, interpolate_pos_encoding=foreign_size)
        if hasattr(self.model, "pre_layrnorm"):  # CLIP's, spelt as in its checkpoints
            hidden_BPD = self.model.pre_layrnorm(hidden_BPD)
        hidden_BPD = self.model.encoder(inputs_embeds=hidden_BPD).last_hidden_state
        if self._normalise_output:
            hidden_BPD = self.model.post_layernorm(hidden_BPD)
        return hidden_BPD[:, self._first_patch :], grid

    def select_weights(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """From a CLIP or SigLIP checkpoint (vision half or whole model), the weights this tower has, and the rest.

        Returns the state dict for `self.model` (what is missing there, `load_state_dict` names) and the surplus names:
        keys that are neither the tower's nor a known part that a cut tower does without.
        """
        wanted = self.model.state_dict().keys()
        picked: dict[str, Tensor] = {}
        surplus: list[str] = []
        for key, tensor in state.items():
            name = key.removeprefix("vision_model.")
            if name in wanted:
                picked[name] = tensor
            elif not (key.startswith(_OTHER_PARTS) or name.startswith(_CUT_PARTS)):
                surplus.append(key)
        return picked, surplus


def build_vision_tower(vision_config: Any, layer: int = -2, cls: bool = False) -> VisionTower:
    """A tower with fresh weights for a CLIP or SigLIP config, or for a whole CLIP or SigLIP model's config."""
    return VisionTower(getattr(vision_config, "vision_config", vision_config), layer, cls)


def _kind(config: Any) -> str:
    kinds = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}
    model_type = getattr(config, "model_type", None)
    if model_type not in kinds:
        raise ValueError(f"vision_config.model_type is {model_type!r}; a vision tower is one of {', '.join(kinds)}")
    return kinds[model_type]


def _single(size: Any, name: str) -> int:
    if not isinstance(size, int):
        raise ValueError(f"vision_config.{name} is {size!r}; one number of pixels is expected")
    return size


def _cut_model(kind: str, config: Any, layer: int) -> nn.Module:
    """transformers' model with the first `layer` blocks, without the parts whose output nobody reads.

    It stays a PreTrainedModel: transformers initialises its weights and, after loading, its non-saved buffers by
    the rules of its own class.
    """
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = layer
    if kind == "clip":
        from transformers.models.clip.modeling_clip import CLIPVisionModel

        model: nn.Module = CLIPVisionModel(cut)
        del model.post_layernorm  # normalises the pooled vector only
        return model
    from transformers.models.siglip.modeling_siglip import SiglipVisionModel

    cut.vision_use_head = False
    model = SiglipVisionModel(cut)
    if layer < config.num_hidden_layers:
        del model.post_layernorm
    return model
