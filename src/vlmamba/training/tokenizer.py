"""The package's own tokenizer: frequent words are one token each, everything else is spelled byte by byte.

A byte-level BPE model without merges (`ignore_merges`, as Llama 3 has it for whole words). With merges, a word that was
never seen would fall into pieces that have nothing to do with its letters; spelled out, reading a new word is reading
known letters in a new order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END, PADDING, IMAGE = "<|endoftext|>", "<|padding|>", "<image>"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, min_share: float, words: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """Learns which words are frequent.

    Digits always stand alone, so that numbers are read and written digit by digit.

    Args:
        vocab_size: most entries, bytes and specials included; the placeholder `<image>` is the last one.
        min_share: share of the texts that a word must occur in to become a token.
        words: become tokens however rare they are, as written within a sentence.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes, the specials and `words`.
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    given = dict.fromkeys(piece for word in words for piece, _ in splitter.pre_tokenize_str(f" {word}"))
    least = 256 + 3 + len(given)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size}: the 256 bytes, 3 special tokens and words need at least {least}")
    found: Counter[str] = Counter()
    total = 0
    for total, text in enumerate(texts, 1):  # noqa: B007 - how many there were is needed below
        found.update({word for word, _ in splitter.pre_tokenize_str(text) if len(word) > 1})
    frequent = [word for word, count in found.most_common() if count >= min_share * total and word not in given]
    frequent = frequent[: vocab_size - least]
    entries = [END, PADDING, *sorted(pre_tokenizers.ByteLevel.alphabet()), *frequent, *given, IMAGE]
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, PADDING, IMAGE])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PADDING,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )
