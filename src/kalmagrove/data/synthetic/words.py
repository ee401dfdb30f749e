"""The words of a synthetic language, and its tokeniser: one token a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kalmagrove.data.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "<|unknown|>"
"""What a word of another language becomes, in a prompt or in a text that a model is scored on."""
END, FIRST_WORD = 0, 2
"""Tokens: the end of a text, and the first of the language's own words."""


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A tokeniser whose tokens are the end of a text, the unknown word and the words, in this order.

    A decoded text has a space before each word, so that generated words go on behind a prompt.

    Args:
        words: All different, without white space.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate([END_OF_TEXT, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex("^"), " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (END_OF_TEXT, UNKNOWN)])
    return tokenizer


def text_of(tokens: np.ndarray, words: Sequence[str]) -> str:
    """The words of a document, divided by spaces.

    Args:
        tokens: The language's own, (tokens,).
        words: Of the language.
    """
    return " ".join([words[number] for number in (tokens - FIRST_WORD).tolist()])
