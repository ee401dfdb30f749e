"""The text that a model is watched on while it is compressed, and a part of it that only measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kalmagrove.data.pieces import iter_document_tokens
from kalmagrove.data.splits import split_documents
from kalmagrove.data.tokenizer import load_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.models.scoring import nats_of_windows
from kalmagrove.precision import Precision

FEWEST_WINDOWS = 4


@dataclass(frozen=True)
class CalibrationText:
    """Windows of tokens, each one more than the model reads at a time.

    Attributes:
        train: (windows, context + 1), what statistics and refits see.
        valid: (windows, context + 1), from further on in the text; it only measures.
    """

    train: Tensor
    valid: Tensor


def read_calibration_text(
    data: str | None, tokenizer_folder: str, *, tokens: int, context_length: int, vocab_size: int
) -> CalibrationText:
    """The first ``tokens`` of a text's training split, and an eighth as many that follow them.

    Args:
        data: A text as for training; None is the built-in corpus.
        tokenizer_folder: Of the model.
        tokens: That statistics and refits see.
        context_length: Tokens of a window.
        vocab_size: Of the model.

    Raises:
        KalmaGroveError: The text is too short, or has tokens that the model does not know.
        UsageError: ``tokens`` are too few for the context.
    """
    return read_windows(
        _training_documents(data),
        data or "the built-in corpus",
        tokenizer_folder,
        tokens=tokens,
        context_length=context_length,
        vocab_size=vocab_size,
    )


def read_windows(
    documents: Iterable[str], source: str, tokenizer_folder: str, *, tokens: int, context_length: int, vocab_size: int
) -> CalibrationText:
    """The first ``tokens`` of documents, and an eighth as many that follow them; no more of them is read.

    Args:
        documents: In their order.
        source: What they are called.
        tokenizer_folder: As for :func:`read_calibration_text`, and so on.

    Raises:
        KalmaGroveError: As there.
        UsageError: As there.
    """
    windows = tokens // context_length
    if windows < FEWEST_WINDOWS:
        raise UsageError(
            f"--calibration_tokens {tokens:,} are fewer than {FEWEST_WINDOWS} windows of {context_length} tokens; give "
            f"at least {FEWEST_WINDOWS * context_length:,}, or a smaller --context_length"
        )
    held_out = max(1, windows // 8)
    needed = (windows + held_out) * context_length + 1
    stream = _first_tokens(documents, tokenizer_folder, needed)
    if len(stream) < needed:
        raise KalmaGroveError(
            f"{source} holds only {len(stream):,} tokens; {needed:,} are needed for calibration "
            "and its check: give a longer --data or fewer --calibration_tokens"
        )
    if int(stream.max()) >= vocab_size:
        raise KalmaGroveError(f"the tokeniser of {tokenizer_folder} has tokens that its model does not know")
    starts = np.arange(windows + held_out)[:, None] * context_length + np.arange(context_length + 1)
    rows = torch.from_numpy(stream[starts])
    return CalibrationText(rows[:windows], rows[windows:])


def _first_tokens(documents: Iterable[str], tokenizer_folder: str, count: int) -> np.ndarray:
    tokenizer = load_tokenizer(tokenizer_folder)
    parts: list[np.ndarray] = []
    read = 0
    for tokens in iter_document_tokens(tokenizer, documents):
        parts.append(tokens)
        read += len(tokens)
        if read >= count:
            break
    return np.concatenate(parts)[:count] if parts else np.zeros(0, dtype=np.int64)


def _training_documents(data: str | None) -> Iterator[str]:
    """What a training on this text would learn from: what is held out there stays unseen here."""
    return (document for split, document in split_documents(data) if split == "train")


def loss_of(model: nn.Module, windows: Tensor, precision: Precision) -> float:
    """Mean nats a token of windows (windows, context + 1)."""
    length = windows.shape[1] - 1
    nats, scored = nats_of_windows(
        model,
        ((row.numpy(), length) for row in windows),
        # Attributes of modules have no types.
        vocab_size=int(model.config.vocab_size),  # type: ignore[union-attr, arg-type]
        device=next(model.parameters()).device,
        precision=precision,
    )
    return nats / scored
