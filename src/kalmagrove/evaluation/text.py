"""Scores any model folder on any text, with the model's own tokeniser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kalmagrove.adaptors.opening import open_with_adaptor
from kalmagrove.data.batches import evaluation_windows
from kalmagrove.data.pieces import iter_document_tokens
from kalmagrove.data.sources import iter_documents
from kalmagrove.data.splits import SPLITS, split_documents
from kalmagrove.data.synthetic.options import is_synthetic
from kalmagrove.data.synthetic.source import synthetic_tokenizer
from kalmagrove.data.tokenizer import load_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.evaluation.perplexity import Scores, scores_from_nats
from kalmagrove.evaluation.synthetic import Reference, reference_of, with_references
from kalmagrove.models.convert import context_of, model_folder
from kalmagrove.models.scoring import nats_of_windows
from kalmagrove.precision import choose_device, choose_precision

CHUNK_TOKENS = 1 << 20
"""Tokens that are scored at once, so that a long text need not lie in memory."""


def score_text(
    model: str,
    source: str | None,
    *,
    split: str | None = None,
    data_seed: int = 0,
    context_length: int | None = None,
    stride: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    adaptor: str | None = None,
) -> Scores:
    """Scores of a model on a text; the documents are joined by the end-of-text token, as in training.

    Of a synthetic task, and a model with its tokeniser, with the optimum on the same windows.

    Args:
        model: A run folder, a model folder or a Hub name.
        source: A text; None is the built-in corpus.
        split: Only the documents of this split.
        data_seed: Divides a text that has no splits; that of the training keeps what was trained on out of the test.
        context_length: Tokens of a window; None is the model's context.
        stride: Tokens between windows; None is the context.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, bf16 or fp32.
        adaptor: The name of one of the model's adaptors, or its folder; None is the model alone.

    Raises:
        KalmaGroveError: The model or the text cannot be read, or the text is too short.
        UsageError: An option does not fit.
    """
    if split is not None and split not in SPLITS:
        raise UsageError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}")
    chosen_device = choose_device(device)
    chosen_precision = choose_precision(precision, chosen_device)
    loaded = open_with_adaptor(model, adaptor).to(chosen_device)
    limit = context_of(loaded.config)
    length = limit if context_length is None else context_length
    step = length if stride is None else stride
    if not 0 < step <= length <= limit:
        raise UsageError(
            f"--stride {step} and --context_length {length} must satisfy 0 < stride <= context <= {limit}, the "
            "model's context"
        )
    tokenizer = load_tokenizer(model_folder(model))
    has_optimum = is_synthetic(source) and tokenizer.get_vocab() == synthetic_tokenizer(source).get_vocab()
    references: list[Reference] = []
    total, tokens, words, text_bytes = 0.0, 0, 0, 0
    for stream, chunk_words, chunk_bytes in _token_chunks(tokenizer, source, split, data_seed):
        if stream.max(initial=0) >= loaded.config.vocab_size:
            raise KalmaGroveError(f"the tokeniser of {model} has tokens that its model does not know")
        terms: dict[str, Any] = {
            "vocab_size": loaded.config.vocab_size,
            "device": chosen_device,
            "precision": chosen_precision,
        }
        windows = evaluation_windows(stream, context_length=length, stride=step)
        nats, scored = nats_of_windows(loaded, windows, **terms)
        if has_optimum and source is not None:
            references.append(reference_of(loaded, source, stream, context_length=length, stride=step, **terms))
        total, tokens = total + nats, tokens + scored
        words, text_bytes = words + chunk_words, text_bytes + chunk_bytes
    if tokens == 0:
        raise KalmaGroveError(f"{source or 'the built-in corpus'} holds fewer than two tokens; nothing can be scored")
    scores = scores_from_nats(total, tokens=tokens, words=words, text_bytes=text_bytes)
    return with_references(scores, references)


def _token_chunks(
    tokenizer: Any, source: str | None, split: str | None, data_seed: int
) -> Iterator[tuple[np.ndarray, int, int]]:
    """(tokens, words, bytes) of whole documents, about CHUNK_TOKENS together."""
    parts: list[np.ndarray] = []
    read = words = text_bytes = 0

    def counted() -> Iterator[str]:
        nonlocal words, text_bytes
        documents = iter_documents(source) if split is None else _documents_of(source, split, data_seed)
        for document in documents:
            words += len(document.split())
            text_bytes += len(document.encode())
            yield document

    for tokens in iter_document_tokens(tokenizer, counted()):
        parts.append(tokens)
        read += len(tokens)
        if read >= CHUNK_TOKENS:
            yield np.concatenate(parts), words, text_bytes
            parts, read, words, text_bytes = [], 0, 0, 0
    if parts:
        yield np.concatenate(parts), words, text_bytes


def _documents_of(source: str | None, split: str, data_seed: int) -> Iterator[str]:
    return (text for name, text in split_documents(source, seed=data_seed) if name == split)
