"""How well the cells of a column are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from kalmagrove.data.tables.codec import TableCodec
from kalmagrove.data.tables.columns import CategoryColumn, DateColumn, NumberColumn
from kalmagrove.evaluation.table_predictions import PredictionTerms, Values, predict_column
from kalmagrove.models.decoder import KalmaGroveForCausalLM

SECONDS_A_DAY = 86400.0


def score_table(
    model: KalmaGroveForCausalLM, codec: TableCodec, rows: Sequence[Values], target: int, terms: PredictionTerms
) -> dict[str, Any]:
    """Scores of the rows that have the column.

    Args:
        model: Of the table.
        codec: Of the table.
        rows: With the target; those without are left out.
        target: The column.
        terms: How predictions are made.

    Returns:
        As `score_predictions` says.
    """
    known = [row for row in rows if row.get(target) is not None]
    return score_predictions(codec, target, predict_column(model, codec, known, target, terms), known)


def score_predictions(
    codec: TableCodec, target: int, predictions: np.ndarray | list[str], rows: Sequence[Values]
) -> dict[str, Any]:
    """Scores of predictions.

    Args:
        codec: Of the table.
        target: The column.
        predictions: Of `predict_column`, a row each.
        rows: With the target.

    Returns:
        ``rows``, and of categories, and numbers whose bins are one value each, ``accuracy`` and ``log_loss`` (nats a
        row) and with two of them ``auc``; of numbers and dates ``rmse``, ``mae`` and ``r2`` of the mean (dates in
        days), and ``nats`` of the bins; of texts ``accuracy``. Nothing but ``rows`` where there are none.
    """
    column, scores = codec.columns[target], {"rows": len(rows)}
    truth = [row[target] for row in rows]
    if not rows:
        return scores
    if not isinstance(predictions, np.ndarray):
        return scores | {"accuracy": float(np.mean([a == b for a, b in zip(predictions, truth, strict=True)]))}
    if isinstance(column, CategoryColumn):
        return scores | _score_choices(predictions, np.array(truth, dtype=np.int64))
    assert isinstance(column, NumberColumn | DateColumn)
    values = np.array(truth, dtype=float)
    unit = SECONDS_A_DAY if isinstance(column, DateColumn) else 1.0
    found: dict[str, Any] = scores | score_numbers(column.scale.mean(predictions) / unit, values / unit)
    own = np.array([column.scale.features(value)[2] for value in values])
    choices = _score_choices(predictions, own)
    return found | (choices if column.scale.is_exact else {"nats": choices["log_loss"]})


def score_numbers(predictions: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Root mean square error, mean absolute error and R2 of numbers, (rows,) each; R2 is 0 where none differ."""
    errors = predictions - truth
    variance = float(np.mean((truth - truth.mean()) ** 2))
    square = float(np.mean(errors**2))
    return {
        "rmse": square**0.5,
        "mae": float(np.mean(np.abs(errors))),
        "r2": 1 - square / variance if variance > 0 else 0.0,
    }


def _score_choices(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    own = probabilities[np.arange(len(truth)), truth]
    scores = {
        "accuracy": float(np.mean(probabilities.argmax(axis=1) == truth)),
        "log_loss": float(-np.log(np.maximum(own, 1e-15)).mean()),
    }
    if probabilities.shape[1] == 2 and 0 < truth.sum() < len(truth):
        scores["auc"] = area_under_curve(probabilities[:, 1], truth)
    return scores


def area_under_curve(scores: np.ndarray, truth: np.ndarray) -> float:
    """How often a row of the second class is scored above one of the first, ties counting half.

    Args:
        scores: (rows,).
        truth: 0 or 1 for each row; both occur.
    """
    ranks = rankdata(scores)
    positive = int(truth.sum())
    above = float(ranks[truth == 1].sum()) - positive * (positive + 1) / 2
    return above / (positive * (len(truth) - positive))
