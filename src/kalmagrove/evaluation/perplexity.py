"""Perplexity a token and a word, and bits a byte, over a whole split."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from kalmagrove.data.batches import evaluation_windows
from kalmagrove.models.scoring import nats_of_windows
from kalmagrove.precision import Precision
from kalmagrove.world import ALONE, World


@dataclass(frozen=True)
class Scores:
    """How well a model predicts a text.

    Attributes:
        loss: Nats a token.
        perplexity: exp of the loss; comparable only between models with the same tokeniser.
        word_perplexity: exp of all nats over the whitespace-separated words; comparable across tokenisers.
        bits_per_byte: All bits over the UTF-8 bytes; comparable across tokenisers.
        tokens: Tokens that were scored: all but the first.
        optimum: Nats a token of the best possible predictor on the same windows, where it is known: of synthetic tasks.
        recall: Of the answers of a recall task, as `summarize_recall` says.
        kinds: Of examples that are no text: ``nats`` and ``elements`` of tokens and of each modality.
    """

    loss: float
    perplexity: float
    word_perplexity: float
    bits_per_byte: float
    tokens: int
    optimum: float | None = None
    recall: dict[str, Any] | None = None
    kinds: dict[str, Any] | None = None

    @property
    def excess(self) -> float | None:
        """Nats a token above the optimum; None where that is not known."""
        return None if self.optimum is None else self.loss - self.optimum

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not known is left out."""
        values = asdict(self) | {"excess": self.excess}
        return {name: value for name, value in values.items() if value is not None}


def scores_from_nats(nats: float, *, tokens: int, words: int, text_bytes: int) -> Scores:
    """The scores of a text on which a model spent ``nats``.

    Args:
        nats: Sum over all scored tokens.
        tokens: Scored tokens.
        words: Whitespace-separated words of the text.
        text_bytes: UTF-8 bytes of the text.
    """
    return Scores(
        loss=nats / tokens,
        perplexity=_exp(nats / tokens),
        word_perplexity=_exp(nats / max(1, words)),
        bits_per_byte=nats / math.log(2) / max(1, text_bytes),
        tokens=tokens,
    )


def score_tokens(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    words: int,
    text_bytes: int,
    context_length: int,
    stride: int,
    vocab_size: int,
    device: torch.device,
    precision: Precision,
    world: World = ALONE,
) -> Scores:
    """Scores of a whole token stream, each token but the first exactly once.

    Args:
        model: Our decoder or any causal language model of transformers.
        tokens: The stream.
        words: Whitespace-separated words of its text.
        text_bytes: UTF-8 bytes of its text.
        context_length: Longest context in tokens.
        stride: Tokens between windows: equal to ``context_length`` is fastest, smaller gives each token more context.
        vocab_size: Of the model.
        device: Of the model.
        precision: Of the forward.
        world: Processes that share the work, as in `nats_of_windows`.
    """
    windows = evaluation_windows(tokens, context_length=context_length, stride=stride)
    nats, scored = nats_of_windows(
        model, windows, vocab_size=vocab_size, device=device, precision=precision, world=world
    )
    return scores_from_nats(nats, tokens=scored, words=words, text_bytes=text_bytes)


def describe_perplexity(perplexity: float | None) -> str:
    """For a person; None is one that no float holds."""
    return "too large" if perplexity is None else f"{perplexity:.2f}"


def describe_optimum(scores: dict[str, Any]) -> list[str]:
    """Lines about the optimum and the recalled answers, for a person; none where the optimum is not known.

    Args:
        scores: As of `Scores.to_dict`.
    """
    if "optimum" not in scores:
        return []
    lines = [f"optimum         {scores['optimum']:.4f} nats a token, the best possible; excess {scores['excess']:.4f}"]
    if "recall" in scores:
        recall = scores["recall"]
        lines.append(f"answers         {recall['accuracy']:.1%} of {recall['answers']:,} right")
        for name, title in (("by_distance_below", "tokens back <"), ("by_pairs_up_to", "pairs up to")):
            shares = "  ".join(f"{bound}: {own['accuracy']:.1%}" for bound, own in recall[name].items())
            lines.append(f"{title:<16}{shares}")
    return lines


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
