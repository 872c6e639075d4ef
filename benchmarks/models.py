"""The models under measurement: ours and the peers', of the same shapes, with random weights.

Shapes: B batch, L length, I images, P visual tokens, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    SiglipVisionConfig,
)

from benchmarks import peers
from vlmamba.models.config import VLMambaConfig
from vlmamba.models.mamba import VLMambaForCausalLM
from vlmamba.models.vlm import VLMambaForConditionalGeneration

OURS, MAMBA_SSM, TRANSFORMER = "vlmamba", "mamba-ssm", "Transformer"
PLAIN, KERNELS = "transformers", "transformers+mamba-ssm"

WIDTHS = {"2.8b": (2560, 64), "130m": (768, 24), "toy": (64, 2)}
IMAGE_TOKEN = 1


@dataclass(frozen=True)
class LanguageModel:
    """A contender: how it is built, and how it reads a prompt into a state and gives the logits that follow it."""

    who: str
    build: Callable[[], nn.Module]
    prefill: Callable[[nn.Module, Tensor], Tensor]
    refusal: str | None = None


def mamba_config(size: str) -> MambaConfig:
    width, layers = WIDTHS[size]
    vocabulary = 256 if size == "toy" else 50280
    return MambaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=vocabulary, residual_in_fp32=True)


def llama_config(size: str) -> LlamaConfig:
    """A Transformer with the parameters of the Mamba of this size: 2.76 billion for 2.8b (Mamba's: 2.77), 128 wide
    heads (the width that attention kernels like best), tied embeddings."""
    width, layers = WIDTHS[size]
    inner = {"2.8b": 7296, "130m": 2048, "toy": 192}[size]
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers // 2,
        num_attention_heads=max(1, width // 128) if size != "toy" else 2,
        intermediate_size=inner,
        vocab_size=mamba_config(size).vocab_size,
        max_position_embeddings=2**18,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def vision_config(size: str) -> SiglipVisionConfig:
    """SigLIP-SO400M at 384 pixels: 27 x 27 patches."""
    if size == "toy":
        return SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=42
        )
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    )


def patches(size: str) -> int:
    config = vision_config(size)
    return (config.image_size // config.patch_size) ** 2


def language_models(size: str, device: torch.device, dtype: torch.dtype) -> list[LanguageModel]:
    """All contenders, ours first. Peers that are not there have a `refusal`."""
    config = mamba_config(size)

    def on_device(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: placed(build, device, dtype)

    no_ssm = peers.refusal("mamba-ssm")
    if no_ssm is None and device.type != "cuda":
        no_ssm = "its kernels need a GPU"
    no_kernels = no_ssm or peers.refusal("causal-conv1d")
    return [
        LanguageModel(OURS, on_device(lambda: VLMambaForCausalLM(config)), read),
        LanguageModel(MAMBA_SSM, on_device(lambda: mamba_ssm_model(size)), read_mamba_ssm, no_ssm),
        LanguageModel(TRANSFORMER, on_device(lambda: LlamaForCausalLM(llama_config(size))), read),
        LanguageModel(KERNELS, on_device(lambda: MambaForCausalLM(config)), read, no_kernels),
        LanguageModel(PLAIN, on_device(lambda: peers.plain_mamba().MambaForCausalLM(config)), read),
    ]


def mamba_ssm_model(size: str) -> nn.Module:
    from mamba_ssm.models.config_mamba import MambaConfig as Config
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    width, layers = WIDTHS[size]
    return MambaLMHeadModel(Config(d_model=width, n_layer=layers, vocab_size=mamba_config(size).vocab_size))


def placed(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Built on the device itself, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = build()
    return model.to(dtype).eval()


def read(model: nn.Module, input_ids: Tensor) -> Tensor:
    """transformers' interface, which is ours: the last position's logits (B, 1, V); the state is made and dropped."""
    return model(input_ids=input_ids, use_cache=True, logits_to_keep=1).logits


def read_through_modules(model: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
    """The same of ours without the graphs and pieces that its `forward` takes by itself: module by module, at once."""
    hidden = model.backbone(input_ids, inputs_embeds=inputs_embeds, use_cache=True).last_hidden_state
    return model.lm_head(hidden[:, -1:])


def read_mamba_ssm(model: nn.Module, input_ids: Tensor) -> Tensor:
    from mamba_ssm.utils.generation import InferenceParams

    state = InferenceParams(max_seqlen=input_ids.shape[1] + 1, max_batch_size=input_ids.shape[0])
    return model(input_ids, inference_params=state, num_last_tokens=1).logits


def our_vlm(size: str, device: torch.device, dtype: torch.dtype) -> VLMambaForConditionalGeneration:
    config = VLMambaConfig(
        vision_config=vision_config(size), text_config=mamba_config(size), image_token_id=IMAGE_TOKEN
    )
    return placed(lambda: VLMambaForConditionalGeneration(config), device, dtype)


def transformer_vlm(size: str, device: torch.device, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """LLaVA: the same tower, two linear layers, the Transformer of the same size."""
    config = LlavaConfig(
        vision_config=vision_config(size),
        text_config=llama_config(size),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=patches(size),
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return placed(lambda: LlavaForConditionalGeneration(config), device, dtype)


def question(size: str, words: int, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """An image and `words` tokens of text for each of `batch` rows: input_ids (B, P + words), pixel_values."""
    config, count = vision_config(size), patches(size)
    vocabulary = mamba_config(size).vocab_size
    ids = torch.randint(2, vocabulary, (batch, count + words), device=device)
    ids[:, :count] = IMAGE_TOKEN
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, device=device, dtype=dtype)
    return {"input_ids": ids, "pixel_values": pixels}


def tokens(size: str, batch: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(2, mamba_config(size).vocab_size, (batch, length), device=device)


def count_parameters(model: Any) -> int:
    """Each parameter once, tied ones too."""
    return sum(p.numel() for p in model.parameters())
