"""Tokens of long texts: each different piece of text is tokenised once, which is several times as fast."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from kalmagrove.data.tokenizer import end_of_text_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A word with the white space before it. Unlike tokenisers, Python counts four separators, 1c to 1f, as white space.
_PIECE = re.compile(r"[^\S\x1c-\x1f]*[\S\x1c-\x1f]+|[^\S\x1c-\x1f]+")
_REMEMBERED_BYTES = 1 << 27
# Of the strings, their dictionary entry and the tokens, beside the characters.
_BYTES_A_PIECE = 200


def make_encoder(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> Callable[[list[str]], list[bytes]]:
    """A function that gives the stored tokens of each of many texts, without end-of-text tokens.

    A special token that stands inside a text is text like any other.

    Args:
        tokenizer: Any tokeniser.
        dtype: How tokens are stored.
    """
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(tokenizer.to_str())
    own.encode_special_tokens = True

    def encode(texts: list[str]) -> list[bytes]:
        encodings = own.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=dtype).tobytes() for encoding in encodings]

    return PieceEncoder(encode) if splits_before_white_space(own) else encode


def iter_document_tokens(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """The tokens of each document, int64, with the token that ends it behind them, as in training."""
    encode, end = make_encoder(tokenizer, np.dtype(np.int64)), end_of_text_id(tokenizer)
    for document in documents:
        yield np.append(np.frombuffer(encode([document])[0], dtype=np.int64), end)


def splits_before_white_space(tokenizer: Tokenizer) -> bool:
    """Whether no token ever spans the beginning of a run of white space, and nothing else depends on what is around.

    True of byte-level BPE with GPT-2's pattern, alone or with digits split off; of others it is not known.
    """
    parts = json.loads(tokenizer.to_str())
    splitter = parts["pre_tokenizer"] or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    last = steps[-1] if steps else {}
    byte_level = last.get("type") == "ByteLevel" and last["use_regex"] and not last["add_prefix_space"]
    return (
        bool(byte_level)
        and all(step.get("type") == "Digits" for step in steps[:-1])
        and parts["normalizer"] is None
        and parts["truncation"] is None
        and parts["model"]["type"] == "BPE"
        and not parts["model"]["dropout"]
        and all(token["special"] for token in parts["added_tokens"])
    )


class PieceEncoder:
    """Encodes texts piece by piece and remembers the pieces, within bounds.

    Args:
        encode: Gives the stored tokens of each of many texts, where those of a text are those of its pieces, joined.
    """

    def __init__(self, encode: Callable[[list[str]], list[bytes]]) -> None:
        self._encode = encode
        self._known: dict[str, bytes] = {}
        self._bytes = 0

    def __call__(self, texts: list[str]) -> list[bytes]:
        """The stored tokens of each text."""
        pieces = [_PIECE.findall(text) for text in texts]
        if self._bytes > _REMEMBERED_BYTES:
            self._known, self._bytes = {}, 0
        self._learn(dict.fromkeys(chain.from_iterable(pieces)))
        return [b"".join(map(self._known.__getitem__, own)) for own in pieces]

    def _learn(self, pieces: Iterable[str]) -> None:
        new = [piece for piece in pieces if piece not in self._known]
        for piece, tokens in zip(new, self._encode(new), strict=True):
            self._known[piece] = tokens
            self._bytes += _BYTES_A_PIECE + len(piece) + len(tokens)
