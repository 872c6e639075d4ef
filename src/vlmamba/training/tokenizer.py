"""The package's own tokenizer: a byte-level BPE learned from text, small enough to ship with a tiny model."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, IMAGE, PADDING = "<|endoftext|>", "<image>", "<|padding|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, spelled: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE of `vocab_size` entries, specials included.

    Digits always stand alone, so that numbers are read and written digit by digit.

    Args:
        texts: what to learn from.
        spelled: words that are never merged into one piece.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the specials.
    """
    if vocab_size < 256 + 3:
        raise ValueError(f"vocab_size {vocab_size}: the 256 bytes and 3 special tokens need at least 259")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PADDING, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        unk_token=END,
        pad_token=PADDING,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
    )
