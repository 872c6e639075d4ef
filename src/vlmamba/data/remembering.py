"""Tokenising text that says the same words again and again."""

from __future__ import annotations

import json
import re
from typing import Any

_BEFORE_A_WORD = re.compile(r"(?<=\S)(?= \S)")
_MOST = 1 << 17


class Remembering:
    """Texts to token ids, special tokens off; words that were met before are looked up.

    Where a tokenizer might take two words together, whole texts are remembered instead.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.by_word = _keeps_words_apart(json.loads(tokenizer.backend_tokenizer.to_str()))
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Token ids, in a list of the caller's own."""
        ids: list[int] = []
        for word in _BEFORE_A_WORD.split(text) if self.by_word else (text,):
            found = self._known.get(word)
            ids += self._learn(word) if found is None else found
        return ids

    def _learn(self, word: str) -> list[int]:
        if len(self._known) >= _MOST:
            self._known.clear()
        ids = self.tokenizer(word, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        self._known[word] = ids
        return ids


def _keeps_words_apart(spec: dict[str, Any]) -> bool:
    """Whether a single blank after a word always begins a token: so it is where GPT-2's rule of splitting comes last
    and nothing before it looks further. `spec`: a tokenizer.json."""
    first = spec["pre_tokenizer"] or {"type": ""}
    *before, last = first.get("pretokenizers", [first])
    return (
        (spec["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and spec["model"]["type"] == "BPE"
        and not spec["model"].get("dropout")
        and last["type"] == "ByteLevel"
        and last["use_regex"]
        and not last["add_prefix_space"]
        and all(stage["type"] == "Split" and "(?" not in str(stage["pattern"]) for stage in before)
        and not any(
            re.search(r"\S \S", token["content"]) or token["lstrip"] or token["rstrip"]
            for token in spec["added_tokens"]
            if not token["special"]
        )
    )
