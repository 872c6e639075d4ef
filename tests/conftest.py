"""What many tests need: a tiny byte-level BPE tokenizer with GPT-NeoX's special tokens."""

from __future__ import annotations

import os

import pytest
import torch

# Before anything imports Triton: its own functions are compiled or interpreted once and for all at import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    """A tokenizer.json: `<|endoftext|>` is 0, `<|padding|>` is 1, runs of blanks are tokens, as in GPT-NeoX's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is this? A red square and the blue circle. USER: ASSISTANT: yes no"], trainer)
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in (4, 3, 2)])
    return tokenizer.to_str()


@pytest.fixture
def tokenizer(tokenizer_json):
    """A fresh fast tokenizer of it, as transformers wraps it; the end of text is its only named token."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json), eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tiny_model(tokenizer_json, tmp_path_factory):
    """Folder of a saved VL-Mamba with random weights: SigLIP at 24 px (9 patches), two Mamba layers, `tokenizer`."""
    import torch
    from tokenizers import Tokenizer
    from transformers import MambaConfig, PreTrainedTokenizerFast, SiglipVisionConfig

    from vlmamba.models.config import VLMambaConfig
    from vlmamba.models.preparation import build_image_processor
    from vlmamba.models.processor import VLMambaProcessor
    from vlmamba.models.vlm import VLMambaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = SiglipVisionConfig(image_size=24, patch_size=8, **sizes)
    text = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json), eos_token="<|endoftext|>")
    processor = VLMambaProcessor(build_image_processor(vision), text, patch_size=8)
    tokens = processor.image_token_id
    language = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=tokens + 3, eos_token_id=0, pad_token_id=1)
    torch.manual_seed(0)
    model = VLMambaForConditionalGeneration(
        VLMambaConfig(vision_config=vision, text_config=language, image_token_id=tokens, num_text_tokens=tokens)
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
