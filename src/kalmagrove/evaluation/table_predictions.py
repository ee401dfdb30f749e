"""What a model of tables says about a column of rows, given their other cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalmagrove.data.examples import Part
from kalmagrove.data.tables.codec import TableCodec, Value
from kalmagrove.data.tables.columns import CategoryColumn, DateColumn, NumberColumn, TextColumn
from kalmagrove.data.tokenizer import end_of_text_id
from kalmagrove.errors import KalmaGroveError
from kalmagrove.modalities.number import NumberModality
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.scoring import evaluating
from kalmagrove.nn.grove import composed_weights
from kalmagrove.precision import Precision, autocast

Values = Mapping[int, Value]
"""The cells of a row that a prediction may look at, by the place of their column; None is a missing value."""


@dataclass(frozen=True)
class PredictionTerms:
    """How predictions are made.

    Attributes:
        orders: Orders of the given columns whose predictions are averaged.
        seed: Draws the orders; a row's do not depend on the rows beside it.
        batch_size: Sequences of one forward.
        precision: Of the forward.
    """

    orders: int = 8
    seed: int = 0
    batch_size: int = 64
    precision: Precision = "fp32"


def predict_column(
    model: KalmaGroveForCausalLM,
    codec: TableCodec,
    rows: Sequence[Values],
    target: int,
    terms: PredictionTerms,
    numbers: Sequence[int] | None = None,
) -> np.ndarray | list[str]:
    """What the cells of a column are, given the others of their rows.

    Args:
        model: Of the table; its mode (training or not) is kept.
        codec: Of the table.
        rows: What the target itself holds is not looked at.
        target: The column.
        terms: How.
        numbers: Of the rows in their file, from 0, for an error's text; left out: all of its rows are here.

    Returns:
        Probabilities (rows, categories or bins) of a column of categories, numbers or dates; or texts.

    Raises:
        KalmaGroveError: A row does not fit into the model's context.
    """
    with evaluating(model), torch.inference_mode(), composed_weights(model):
        if isinstance(codec.columns[target], TextColumn):
            return _texts(model, codec, rows, target, terms, numbers or range(len(rows)))
        return _probabilities(model, codec, rows, target, terms)


def _probabilities(
    model: KalmaGroveForCausalLM, codec: TableCodec, rows: Sequence[Values], target: int, terms: PredictionTerms
) -> np.ndarray:
    head, orders = _head(model, codec, target), _orders(codec, terms)
    sums = np.zeros((len(rows), _choices(codec, target)))
    for first in range(0, len(rows), terms.batch_size):
        cells = [_cells(codec, row, target) for row in rows[first : first + terms.batch_size]]
        for order in orders:
            sequences = [_sequence(codec, own, order, target) for own in cells]
            hidden = _last_hidden(model, codec, sequences, terms)
            sums[first : first + len(cells)] += head(hidden).double().cpu().numpy()
    return sums / terms.orders


def _choices(codec: TableCodec, target: int) -> int:
    column = codec.columns[target]
    if isinstance(column, NumberColumn | DateColumn):
        return column.scale.bins
    return len(codec.category_tokens[target])


def _head(model: KalmaGroveForCausalLM, codec: TableCodec, target: int) -> Callable[[Tensor], Tensor]:
    """From hidden states (rows, hidden) to probabilities (rows, choices), given that the value is not missing."""
    if target in codec.number_places:
        modality, own = model.model.modalities["number"], codec.number_places[target]
        assert isinstance(modality, NumberModality)
        bins = _choices(codec, target)

        def of_bins(hidden: Tensor) -> Tensor:
            columns = torch.full((len(hidden),), own, device=hidden.device)
            return modality.log_probabilities(hidden, columns)[:, :bins].exp()

        return of_bins
    tokens = torch.tensor(codec.category_tokens[target], device=model.device)
    return lambda hidden: model.precise_logits(hidden)[:, tokens].softmax(dim=-1)


def _texts(
    model: KalmaGroveForCausalLM,
    codec: TableCodec,
    rows: Sequence[Values],
    target: int,
    terms: PredictionTerms,
    numbers: Sequence[int],
) -> list[str]:
    """The likeliest token at each step, by the mean of all orders, until the text ends or the context is full.

    Raises:
        KalmaGroveError: The other cells of a row leave no room for it.
    """
    special = set(codec.tokenizer.get_added_tokens_decoder()) - {codec.end_token}
    forbidden = torch.tensor(sorted(special), device=model.device)
    found, limit = [], model.config.max_position_embeddings
    size = max(1, terms.batch_size // terms.orders)
    for first in range(0, len(rows), size):
        cells = [_cells(codec, row, target) for row in rows[first : first + size]]
        sequences = [[_sequence(codec, own, order, target) for order in _orders(codec, terms)] for own in cells]
        texts: list[list[int]] = [[] for _ in cells]
        # A row that has come to its end does not grow, and the length of one does not cut another.
        growing = list(range(len(cells)))
        full = next((number for number in growing if len(sequences[number][0]) >= limit), None)
        if full is not None:
            raise KalmaGroveError(
                f"row {numbers[first + full] + 1} leaves no room in the model's context of {limit} tokens for "
                f"{codec.columns[target].name}; shorten its texts, or train with a larger loop.context_length"
            )
        while growing:
            batch = [sequence for number in growing for sequence in sequences[number]]
            logits = model.precise_logits(_last_hidden(model, codec, batch, terms))
            logits[:, forbidden] = -torch.inf
            if not texts[growing[0]]:
                # An empty text would be a missing value.
                logits[:, codec.end_token] = -torch.inf
            mean = logits.softmax(dim=-1).unflatten(0, (len(growing), terms.orders)).mean(dim=1)
            for number, token in zip(list(growing), mean.argmax(dim=-1).tolist(), strict=True):
                if token == codec.end_token:
                    growing.remove(number)
                    continue
                texts[number].append(token)
                for sequence in sequences[number]:
                    sequence.add([token])
                if len(sequences[number][0]) >= limit:
                    growing.remove(number)
        found += [codec.tokenizer.decode(text) for text in texts]
    return found


class _Sequence:
    """Tokens of a row and the features of its numbers, by their places."""

    def __init__(self, end_of_text: int) -> None:
        self.tokens = [end_of_text]
        self.numbers: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens

    def add_part(self, part: Part) -> None:
        for features in part.features.get("number", ()):
            # A cell of a number is two tokens, and its number is the second.
            self.numbers[len(self.tokens) + 1] = features
        self.add(part.tokens.tolist())


def _cells(codec: TableCodec, row: Values, target: int) -> dict[int, Part]:
    """The given cells of a row; that a value is missing says something only where the model has seen it."""
    return {
        place: codec.part(place, value)
        for place, value in row.items()
        if place != target and (value is not None or codec.columns[place].has_missing)
    }


def _sequence(codec: TableCodec, cells: Mapping[int, Part], order: np.ndarray, target: int) -> _Sequence:
    """The given cells of a row in an order, and the token of the column that is to be predicted."""
    sequence = _Sequence(end_of_text_id(codec.tokenizer))
    for place in order.tolist():
        if place in cells:
            sequence.add_part(cells[place])
    sequence.add([codec.column_tokens[target]])
    return sequence


def _orders(codec: TableCodec, terms: PredictionTerms) -> list[np.ndarray]:
    """Orders of the columns, the same for every row."""
    draws = (np.random.PCG64(np.random.SeedSequence([terms.seed, order])) for order in range(terms.orders))
    return [np.argsort(draw.random_raw(len(codec.columns)), kind="stable") for draw in draws]


def _last_hidden(
    model: KalmaGroveForCausalLM, codec: TableCodec, sequences: Sequence[_Sequence], terms: PredictionTerms
) -> Tensor:
    """The hidden state (sequences, hidden) of each sequence's last token."""
    longest, limit = max(map(len, sequences)), model.config.max_position_embeddings
    if longest > limit:
        raise KalmaGroveError(f"a row has {longest} tokens, the model's context is {limit}; shorten its texts")
    # What stands behind a sequence is not seen by it.
    tokens = np.zeros((len(sequences), longest), dtype=np.int64)
    features = np.zeros((len(sequences), longest, NumberModality.feature_size), dtype=np.float32)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence.tokens
        if sequence.numbers:
            features[row, list(sequence.numbers)] = list(sequence.numbers.values())
    inputs = {"number": torch.from_numpy(features).to(model.device)} if codec.number_places else None
    with autocast(terms.precision, model.device):
        hidden: Tensor = model.model(torch.from_numpy(tokens).to(model.device), features=inputs).last_hidden_state
    last = torch.tensor([len(sequence) - 1 for sequence in sequences], device=model.device)
    return hidden[torch.arange(len(sequences), device=model.device), last].float()


def describe(
    codec: TableCodec, target: int, predictions: np.ndarray | list[str], quantiles: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """Predictions as JSON, one for each row: a ``prediction`` and what there is to say about it.

    The prediction is the likeliest category, the median of a number or date, or a text. A column of few different
    numbers has the probability of each too.

    Args:
        codec: Of the table.
        target: The column.
        predictions: Of `predict_column`.
        quantiles: Levels between 0 and 1 that are given for numbers and dates.
    """
    column = codec.columns[target]
    if isinstance(column, TextColumn):
        return [{"prediction": text} for text in predictions]
    assert isinstance(predictions, np.ndarray)
    if isinstance(column, CategoryColumn):
        return [
            {
                "prediction": column.values[int(row.argmax())],
                "probabilities": dict(zip(column.values, map(float, row), strict=True)),
            }
            for row in predictions
        ]
    means, medians = column.scale.mean(predictions), column.scale.quantile(predictions, 0.5)
    levels = {f"{level:g}": column.scale.quantile(predictions, level) for level in quantiles}
    show_mean = column.show if isinstance(column, DateColumn) else float
    found: list[dict[str, Any]] = [
        {
            "prediction": column.show(float(medians[row])),
            "mean": show_mean(float(means[row])),
            "quantiles": {name: column.show(float(values[row])) for name, values in levels.items()},
        }
        for row in range(len(predictions))
    ]
    if column.scale.is_exact:
        names = [str(column.show(value)) for value in column.scale.means]
        for own, row in zip(found, predictions, strict=True):
            own["probabilities"] = dict(zip(names, map(float, row), strict=True))
    return found
