"""Tokenising text that says the same words again and again."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer

_BEFORE_A_WORD = re.compile(r"(?<=\S)(?= \S)")
# What is remembered of words: none that white space leaves in doubt, so that whatever is found was rightly cut.
_FIRST = re.compile(r".*\S", re.DOTALL)
_AFTER = re.compile(r"\S(.*\S)? ?", re.DOTALL)
_MOST = 1 << 17


class Remembering:
    """Texts to token ids, special tokens off; words that were met before are looked up.

    Where a tokenizer might take two words together, whole texts are remembered instead.

    Args:
        tokenizer: a fast tokenizer of transformers. It is copied: what becomes of it later changes nothing here.
    """

    def __init__(self, tokenizer: Any) -> None:
        spec = tokenizer.backend_tokenizer.to_str()
        self.backend = Tokenizer.from_str(spec)
        self.backend.no_padding()
        self.backend.no_truncation()
        self.by_word = _keeps_words_apart(json.loads(spec))
        self._first: dict[str, list[int]] = {}  # what a text begins with
        self._after: dict[str, list[int]] = {}  # words after a blank, which is their tokens' but left out of the key

    def __call__(self, text: str) -> list[int]:
        """Token ids, in a list of the caller's own."""
        first, *others = text.split(" ") if self.by_word else (text,)
        if len(others) > 1 and not others[-1]:  # a blank at the end belongs to the last word
            others[-2:] = [others[-2] + " "]
        try:
            ids = [] if others and not first else self._first[first].copy()
            for found in map(self._after.__getitem__, others):
                ids += found
        except KeyError:
            words = _BEFORE_A_WORD.split(text) if self.by_word else (text,)
            return [token for word in words for token in self._learn(word)]
        return ids

    def _learn(self, word: str) -> list[int]:
        known, key, pattern = self._first, word, _FIRST
        if self.by_word and word.startswith(" "):
            known, key, pattern = self._after, word[1:], _AFTER
        if key not in known:
            self.backend.encode_special_tokens = True  # which a copy of this object would not know
            ids = self.backend.encode(word, add_special_tokens=False).ids
            if self.by_word and not pattern.fullmatch(key):
                return ids
            if len(self._first) + len(self._after) >= _MOST:
                self._first.clear()
                self._after.clear()
            known[key] = ids
        return known[key]


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
