"""Missing cells of rows, filled in one after the other, the most certain first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kalmagrove.data.tables.codec import TableCodec, Value
from kalmagrove.data.tables.columns import DateColumn, NumberColumn, TextColumn
from kalmagrove.errors import KalmaGroveError
from kalmagrove.evaluation.table_predictions import PredictionTerms, Values, predict_column
from kalmagrove.models.decoder import KalmaGroveForCausalLM


def impute(
    model: KalmaGroveForCausalLM,
    codec: TableCodec,
    rows: Sequence[Values],
    wanted: Sequence[set[int]],
    terms: PredictionTerms,
) -> list[dict[int, Value]]:
    """Rows with their wanted cells filled in.

    In each round the model predicts all open cells of a row from those that are known or filled by now, and the most
    certain one is kept: the one whose entropy is the smallest part of the largest that it could have. Texts come last,
    in the order of their columns. A category is the likeliest, a number or date the median.

    Args:
        model: Of the table.
        codec: Of the table.
        rows: What is known; missing values are not looked at.
        wanted: The columns that are to be filled in each row.
        terms: How predictions are made.

    Returns:
        What is known of each row together with what was filled in.

    Raises:
        KalmaGroveError: A prediction is no number, as of a model whose weights are damaged.
    """
    filled: list[dict[int, Value]] = [{p: v for p, v in row.items() if v is not None} for row in rows]
    texts = {place for place, column in enumerate(codec.columns) if isinstance(column, TextColumn)}
    open_cells = [set(places) - texts for places in wanted]
    while any(open_cells):
        found: list[tuple[float, int, Value]] = [(math.inf, -1, None)] * len(rows)
        for place in sorted(set().union(*open_cells)):
            own = [number for number, cells in enumerate(open_cells) if place in cells]
            predictions = predict_column(model, codec, [filled[number] for number in own], place, terms)
            assert isinstance(predictions, np.ndarray)
            values, doubts = _likely_values(codec, place, predictions), relative_entropy(predictions)
            if np.isnan(doubts).any():
                name = codec.columns[place].name
                raise KalmaGroveError(f"the model's predictions of {name} are no numbers; train the model again")
            for number, value, doubt in zip(own, values, doubts.tolist(), strict=True):
                found[number] = min(found[number], (doubt, place, value), key=lambda item: item[0])
        for number, (_, place, value) in enumerate(found):
            if place >= 0:
                filled[number][place] = value
                open_cells[number].remove(place)
    for place in sorted(texts):
        own = [number for number, places in enumerate(wanted) if place in places]
        written = predict_column(model, codec, [filled[number] for number in own], place, terms, own)
        for number, text in zip(own, written, strict=True):
            filled[number][place] = str(text)
    return filled


def relative_entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropies (rows,) of distributions (rows, choices) as parts of the largest that there can be."""
    entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum(axis=1)
    return np.asarray(entropy / max(math.log(probabilities.shape[1]), 1e-9))


def _likely_values(codec: TableCodec, place: int, predictions: np.ndarray) -> list[Value]:
    column = codec.columns[place]
    if isinstance(column, NumberColumn | DateColumn):
        # As it is written, so that what follows is predicted from what a reader sees.
        return [column.read(column.show(median)) for median in column.scale.quantile(predictions, 0.5).tolist()]
    return list(predictions.argmax(axis=1).tolist())
