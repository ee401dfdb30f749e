"""Scores of the synthetic tasks: the best possible loss on the same windows, the entropy rate, and recalled answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kalmagrove.data.batches import evaluation_windows
from kalmagrove.data.synthetic.draws import UniformDraws
from kalmagrove.data.synthetic.recall import RecallSource
from kalmagrove.data.synthetic.source import STREAMS, open_synthetic
from kalmagrove.evaluation.perplexity import Scores
from kalmagrove.models.scoring import LOGIT_BUDGET, evaluating, stacked_windows
from kalmagrove.precision import Precision, autocast

WINDOWS_AT_ONCE = 256

Window = tuple[np.ndarray, int]


@dataclass(frozen=True)
class EntropyRate:
    """Bounds of a source's entropy rate, in nats a token.

    Attributes:
        lower: Mean entropy of the next token given those before and the state before all of them.
        upper: Mean entropy of the next token given those before alone.
        lower_error: Standard error of the lower bound.
        upper_error: Standard error of the upper bound.
    """

    lower: float
    upper: float
    lower_error: float
    upper_error: float


@dataclass(frozen=True)
class RecallOutcome:
    """What a model made of one answer that its window tells.

    Attributes:
        distance: Tokens since the key was last mentioned.
        pairs: Keys that were mentioned in the document so far.
        nats: Spent on the answer.
        is_right: Whether the answer was the likeliest token of the vocabulary.
    """

    distance: int
    pairs: int
    nats: float
    is_right: bool


@dataclass(frozen=True)
class Reference:
    """What is known of a stream of a synthetic task.

    Attributes:
        nats: Of the best possible predictor, on all tokens that are scored.
        outcomes: What the model made of the answers; empty where the task has none.
    """

    nats: float
    outcomes: list[RecallOutcome]


def optimum_nats(source: str, windows: Iterable[Window]) -> float:
    """The nats that the best possible predictor spends on windows of a source: of all that count in them together.

    It knows the source, and of the text its window, from its first token on, as a model does.

    Args:
        source: A synthetic task.
        windows: (tokens, scored) pairs, as of `evaluation_windows`: the last ``scored`` tokens count.

    Raises:
        KalmaGroveError: A window cannot come from the source.
    """
    known = open_synthetic(source)
    return sum(
        float(known.window_nats(batch)[:, -scored:].sum())
        for batch, scored in stacked_windows(windows, most=WINDOWS_AT_ONCE)
    )


def entropy_rate(source: str, *, windows: int = 512, length: int = 1024) -> EntropyRate:
    """The entropy rate of a source: exact for recall, and between two bounds for a hidden Markov source.

    The bounds are those of Cover and Thomas, "Elements of Information Theory", theorem 4.5.1: for a stationary hidden
    Markov chain H(X_n | X_1 ... X_n-1, S_1) <= H <= H(X_n | X_1 ... X_n-1), and both go to H. They are estimated as
    the mean entropy of the exact prediction over the last quarter of windows from random places.

    Args:
        source: A synthetic task.
        windows: Windows of the estimate.
        length: Their tokens, at least 4.
    """
    known = open_synthetic(source)
    if isinstance(known, RecallSource):
        rate = known.entropy_rate()
        return EntropyRate(rate, rate, 0.0, 0.0)
    draws = UniformDraws(known.options.seed, 1 + max(STREAMS.values()), 0)
    tokens, states = known.model.sample_windows(windows, length, draws)
    upper = _last_entropies(known.model.predictions(tokens), known.model.emission, length)
    given = np.eye(len(known.model.transition))[states]
    lower = _last_entropies(known.model.predictions(tokens, given), known.model.emission, length)
    errors = [float(bound.std(ddof=1)) / math.sqrt(windows) for bound in (lower, upper)]
    return EntropyRate(float(lower.mean()), float(upper.mean()), *errors)


def recall_outcomes(
    model: nn.Module,
    source: str,
    windows: Iterable[Window],
    *,
    vocab_size: int,
    device: torch.device,
    precision: Precision,
) -> list[RecallOutcome]:
    """What a model makes of each answer of a recall task that its window tells and that counts.

    Args:
        model: Called as ``model(input_ids=...)``; gives ``logits``. Its mode (training or not) is kept.
        source: A recall task; others have no answers.
        windows: (tokens, scored) pairs, as of `evaluation_windows`.
        vocab_size: Of the logits.
        device: Of the model.
        precision: Of the products.
    """
    known = open_synthetic(source)
    if not isinstance(known, RecallSource):
        return []
    outcomes: list[RecallOutcome] = []
    with evaluating(model):
        for batch, scored in stacked_windows(windows, most=WINDOWS_AT_ONCE, most_tokens=LOGIT_BUDGET // vocab_size):
            first = batch.shape[1] - scored
            rows = [known.answers(window) for window in batch.tolist()]
            asked = [(row, answer) for row, own in enumerate(rows) for answer in own if answer.place >= first]
            tokens = torch.from_numpy(batch).to(device)
            with torch.no_grad(), autocast(precision, device):
                logits = model(input_ids=tokens[:, :-1]).logits
            chosen = [row for row, _ in asked], [answer.place for _, answer in asked]
            guesses = logits[chosen[0], [place - 1 for place in chosen[1]]].float()
            nats = F.cross_entropy(guesses, tokens[chosen], reduction="none").tolist()
            right = (guesses.argmax(dim=-1) == tokens[chosen]).tolist()
            outcomes += [
                RecallOutcome(answer.distance, answer.pairs, *own)
                for (_, answer), *own in zip(asked, nats, right, strict=True)
            ]
    return outcomes


def summarize_recall(outcomes: Sequence[RecallOutcome]) -> dict[str, Any]:
    """Numbers for JSON: of all answers, and by distance and by pairs up to powers of two, which are the names.

    A distance stands under the first power of two that is larger; a number of pairs under the first that is not
    smaller.
    """
    by_distance = _binned(outcomes, [1 << outcome.distance.bit_length() for outcome in outcomes])
    by_pairs = _binned(outcomes, [1 << (outcome.pairs - 1).bit_length() for outcome in outcomes])
    return {**_share(outcomes), "by_distance_below": by_distance, "by_pairs_up_to": by_pairs}


def reference_of(
    model: nn.Module,
    source: str,
    tokens: np.ndarray,
    *,
    context_length: int,
    stride: int,
    vocab_size: int,
    device: torch.device,
    precision: Precision,
) -> Reference:
    """What is known of a synthetic text, to hold a model's scores against.

    Args:
        model: As for `recall_outcomes`.
        source: The task that the text comes from.
        tokens: The stream that is scored.
        context_length: As it is scored.
        stride: As it is scored.
        vocab_size: As for `recall_outcomes`.
        device: As for `recall_outcomes`.
        precision: As for `recall_outcomes`.

    Raises:
        KalmaGroveError: The stream cannot come from the source.
    """

    def windows() -> Iterator[Window]:
        return evaluation_windows(tokens, context_length=context_length, stride=stride)

    nats = optimum_nats(source, windows())
    return Reference(
        nats, recall_outcomes(model, source, windows(), vocab_size=vocab_size, device=device, precision=precision)
    )


def with_references(scores: Scores, references: Sequence[Reference]) -> Scores:
    """Scores together with the optimum and the recalled answers of the streams that were scored; as they are if none.

    Args:
        scores: Of all streams together.
        references: Of each stream.
    """
    if not references:
        return scores
    outcomes = [outcome for reference in references for outcome in reference.outcomes]
    optimum = sum(reference.nats for reference in references) / scores.tokens
    return replace(scores, optimum=optimum, recall=summarize_recall(outcomes) if outcomes else None)


def _last_entropies(
    predictions: Iterator[tuple[np.ndarray, np.ndarray]], emission: np.ndarray, length: int
) -> np.ndarray:
    """Mean entropy of the predicted token over the last quarter of each window, (windows,)."""
    entropies = []
    for place, (states, _) in enumerate(predictions):
        if place >= length - max(1, length // 4):
            tokens = states @ emission
            entropies.append(-(tokens * np.log(np.where(tokens > 0, tokens, 1.0))).sum(axis=1))
    return np.mean(entropies, axis=0)


def _binned(outcomes: Sequence[RecallOutcome], bounds: Sequence[int]) -> dict[str, dict[str, float]]:
    return {
        str(bound): _share([outcome for outcome, own in zip(outcomes, bounds, strict=True) if own == bound])
        for bound in sorted(set(bounds))
    }


def _share(outcomes: Sequence[RecallOutcome]) -> dict[str, float]:
    return {
        "answers": len(outcomes),
        "accuracy": sum(outcome.is_right for outcome in outcomes) / len(outcomes),
        "nats": sum(outcome.nats for outcome in outcomes) / len(outcomes),
    }
