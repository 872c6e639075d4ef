"""A tokenizer that remembers words gives what it would give without."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vlmamba.data.remembering import Remembering
from vlmamba.data.scenes import World
from vlmamba.training.tokenizer import train_tokenizer

WORLD = World(9)
LEARNED = train_tokenizer((WORLD.text(i) for i in range(60)), 500, 0.05)
REMEMBERING = Remembering(LEARNED)


def plainly(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_scenes_in_words() -> None:
    assert REMEMBERING.by_word
    for index in range(100, 140):
        text = WORLD.text(index)
        assert REMEMBERING(text) == plainly(LEARNED, text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from(" \n\t'sab1<>|.é"), st.characters(codec="utf-8")), max_size=30))
def test_any_text(text: str) -> None:
    assert REMEMBERING(text) == plainly(LEARNED, text)
    assert REMEMBERING(text) == plainly(LEARNED, text)  # now from memory


def test_special_tokens_stay_text() -> None:
    assert REMEMBERING(" <image> <|endoftext|>") == plainly(LEARNED, " <image> <|endoftext|>")
    assert LEARNED.convert_tokens_to_ids("<image>") not in REMEMBERING("a <image>")


def test_what_is_given_out_is_the_callers_own() -> None:
    REMEMBERING("red").append(-1)
    assert REMEMBERING("red") == plainly(LEARNED, "red")


@pytest.mark.parametrize("added", ["two words", None])
def test_a_tokenizer_that_joins_words(added: str | None) -> None:
    """An entry of two words, or a rule that cuts nowhere: whole texts are remembered."""
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2, "aĠb": 3, "aĠ": 4}, [("a", "Ġ"), ("aĠ", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=added is not None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if added:
        tokenizer.add_tokens([added])
    remembering = Remembering(tokenizer)
    assert not remembering.by_word
    for text in ("a b", "a b a b"):
        assert remembering(text) == plainly(tokenizer, text)
