"""What many tests need: a tiny byte-level BPE tokenizer with GPT-NeoX's special tokens."""

from __future__ import annotations

import pytest


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
