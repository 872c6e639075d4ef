"""VL-Mamba: vision encoder, connector, Mamba language model (arXiv 2403.13600, figure 1).

Shapes: B batch, L length, I images of the whole batch in reading order, P visual tokens of an image, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from vlmamba.models import prefill_images
from vlmamba.models.config import VLMambaConfig
from vlmamba.models.connector import VSS, Connector, OrderLinear
from vlmamba.models.mamba import MambaOutput, RecurrentGenerationMixin, VLMambaForCausalLM, VLMambaPreTrainedModel
from vlmamba.models.padding import Compaction
from vlmamba.models.state import MambaState
from vlmamba.models.vision import VisionTower, build_vision_tower


class VLMambaForConditionalGeneration(VLMambaPreTrainedModel, RecurrentGenerationMixin):
    """Answers in text to images and text. `from_parts` composes one from pre-trained parts."""

    config_class = VLMambaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _no_split_modules = ["MambaBlock", "CLIPEncoderLayer", "SiglipEncoderLayer", "VSS"]
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.backbone.embeddings.weight"}
    _supports_sdpa = True

    def __init__(
        self,
        config: VLMambaConfig,
        vision_tower: VisionTower | None = None,
        language_model: VLMambaForCausalLM | None = None,
    ):
        """Parts that are not given are made anew, with random weights."""
        super().__init__(config)
        for part in (vision_tower, language_model):
            for module in part.modules() if part is not None else ():
                module._is_hf_initialized = True  # post_init draws weights for what is new only
        self.vision_tower = vision_tower or build_vision_tower(
            config.vision_config, config.vision_layer, config.vision_cls
        )
        self.connector = Connector(config)
        self.language_model = language_model or VLMambaForCausalLM(config.text_config)
        self.post_init()

    @classmethod
    def from_parts(cls, vision: str, language: str, **options: Any) -> VLMambaForConditionalGeneration:
        """A model of pre-trained parts and a new connector; see `vlmamba.models.weights.compose`."""
        from vlmamba.models.weights import compose

        return compose(vision, language, **options)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.lm_head = new_embeddings

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """As transformers', for a tokenizer with more entries: all of them may be generated from now on, but the
        placeholder of images, which keeps its id."""
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if new_num_tokens is not None:
            self.config.num_text_tokens = new_num_tokens
        return embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VSS):
            init_vss(module)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Images (I, 3, H, W), normalised by the processor, to tokens (I, P, d) of the language model."""
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be (images, 3, height, width), got {tuple(pixel_values.shape)}")
        return prefill_images.read(self, pixel_values, self._features)

    def _features(self, pixel_values: Tensor) -> Tensor:
        tower = self.vision_tower
        trained = any(p.requires_grad for p in tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            patches, grid = tower(pixel_values.to(next(tower.parameters()).dtype))
        return self.connector(patches, grid)

    def _words(self, input_ids: Tensor, seen: bool) -> tuple[Tensor, Check | None]:
        """Ids (B, L) of text alone, and a check that they are, if it is still to be made."""
        is_image = input_ids == self.config.image_token_id
        words = input_ids.masked_fill(is_image, 0)
        return words, None if seen else Check(is_image.sum(), None).unless_made(can_wait(input_ids))

    def _with_images(self, input_ids: Tensor, pixel_values: Tensor, seen: bool = False) -> tuple[Tensor, Check | None]:
        """Embeddings (B, L, d), and a check that there is an image for every placeholder, if it is still to be made."""
        features = self.get_image_features(pixel_values)  # first: the device works on it while we go on
        is_image = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        check = None if seen else Check(is_image.sum(), features.shape[:2]).unless_made(can_wait(input_ids))
        tokens = features.to(embeds.dtype).flatten(0, 1)
        # Not masked_scatter: the shape of its gradient is asked of the device. This is safe whatever the numbers.
        place = is_image.flatten().cumsum(0).sub_(1).clamp_(0, max(len(tokens) - 1, 0))
        if not torch.is_grad_enabled() and len(tokens):
            return torch.where(is_image[..., None], tokens[place.view(input_ids.shape)], embeds), check
        words = torch.arange(place.numel(), device=place.device)
        source = torch.where(is_image.flatten(), place + place.numel(), words)
        return torch.cat([embeds.flatten(0, 1), tokens]).index_select(0, source).view_as(embeds), check

    def _is_one_more_word(self, input_ids: Tensor) -> bool:
        """Whether each row (B, L) is one token of text. On a GPU a placeholder goes unnoticed: looking would wait."""
        if input_ids.shape[1] != 1:
            return False
        return input_ids.is_cuda or not bool((input_ids == self.config.image_token_id).any())

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: MambaState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        seq_idx: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_labels: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MambaOutput:
        """As `VLMambaForCausalLM.forward`, with images.

        Args:
            input_ids: (B, L); every image stands as P copies of `config.image_token_id`.
            pixel_values: (I, 3, H, W), the images of the whole batch in reading order; I may be 0.
            labels: as there; `input_ids` may be given, as placeholders have no loss.
            num_labels: how many positions have a label to predict, from a caller who has looked at the batch before it
                went to the device, and seen that its images fit: nothing is then waited for.
        """
        padding, check = None, None
        if pixel_values is not None and not len(pixel_values):
            pixel_values = None
        if attention_mask is not None:  # looked at before the device is given work: looking waits for it
            tokens = input_ids if inputs_embeds is None else inputs_embeds
            padding = None if tokens is None else Compaction.of(attention_mask, seq_idx, tokens.shape[:2])
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give either input_ids or inputs_embeds")
            if pixel_values is not None:
                inputs_embeds, check = self._with_images(input_ids, pixel_values, num_labels is not None)
                input_ids = None
            elif cache_params is None or not self._is_one_more_word(input_ids):
                input_ids, check = self._words(input_ids, num_labels is not None)
        elif pixel_values is not None:
            raise ValueError("give images either as pixel_values with input_ids, or inside inputs_embeds")
        else:
            input_ids = None
        if labels is not None and num_labels is None:
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)
        output = self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=padding,
            cache_params=cache_params,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            seq_idx=seq_idx,
            num_items_in_batch=num_items_in_batch,
            num_tokens=self.config.num_text_tokens,
            num_labels=num_labels,
            output_hidden_states=output_hidden_states,
        )
        if output.logits is not None and self.config.image_token_id < output.logits.shape[-1]:
            output.logits[..., self.config.image_token_id] = -torch.inf  # a placeholder is never an answer
        if check is not None:
            check()
        return output

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Copies each prompt `expand_size` times, all its images together, and the state it continues from."""
        state = model_kwargs.get("cache_params")
        if expand_size > 1 and pixel_values is not None and input_ids is not None:
            placeholders = (input_ids == self.config.image_token_id).sum(1)
            images = (placeholders * len(pixel_values) // placeholders.sum().clamp(min=1)).tolist()
            pixel_values = torch.cat([own.repeat(expand_size, 1, 1, 1) for own in pixel_values.split(images)])
        if expand_size > 1 and state is not None and state.slots is not None:
            slots = torch.arange(state.slots).repeat_interleave(expand_size)
            model_kwargs["cache_params"] = state.gather(slots)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | ({} if pixel_values is None else {"pixel_values": pixel_values})


def can_wait(input_ids: Tensor) -> bool:
    """Whether what the ids hold is looked at only when the device has work to do: asking it earlier leaves it idle."""
    return input_ids.is_cuda and not torch.is_grad_enabled()


@dataclass(frozen=True, eq=False)  # torch.compile asks for a hash before there are fields to hash
class Check:
    """Whether text and images fit: placeholders, a number on the device; images and tokens of each, None without."""

    placeholders: Tensor
    images: tuple[int, ...] | None

    def unless_made(self, later: bool) -> Check | None:
        """This check for later; or None, and it is made now."""
        if later:
            return self
        self()
        return None

    def __call__(self) -> None:
        """ValueError if they do not. Waits for the device."""
        if self.placeholders.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        expected = int(self.placeholders)
        if self.images is None:
            if expected:
                raise ValueError(
                    f"the text holds {expected} image placeholders, but no pixel_values were given; where a state goes "
                    "on (cache_params), give the new tokens alone"
                )
            return
        images, each = self.images
        if images * each != expected:
            raise ValueError(
                f"the text holds {expected} image placeholders, the {images} images give {images * each} visual tokens "
                f"({each} each)"
            )


def init_vss(vss: VSS) -> None:
    """Mamba-1's initialisation for the parameters that the VSS holds itself."""
    bound = vss.conv_width**-0.5
    init.uniform_(vss.conv_weight, -bound, bound)
    init.zeros_(vss.conv_bias)
    for projection, features_in in ((vss.x_proj, vss.channels), (vss.dt_proj, vss.rank)):
        if isinstance(projection, OrderLinear):
            init.uniform_(projection.weight, -(features_in**-0.5), features_in**-0.5)
    init.uniform_(vss.dt_proj.weight, -(vss.rank**-0.5), vss.rank**-0.5)
