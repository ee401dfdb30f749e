"""The laws that can be fitted, each a log-sum-exp of terms that are linear in its unknowns.

    power       PPL  = c N^-alpha D^-beta r^-gamma            (the paper's equation 5; loss = log PPL is one term)
    hoffmann    loss = E + A N^-alpha r^-gamma + B D^-beta    (arXiv:2203.15556; log loss has three)

``r`` is the rank ratio, and takes part where runs have several. With repeated text D is what its tokens are worth,
D' = U + U R* (1 - exp(-R / R*)) for U different tokens that are read R more times (arXiv:2305.16264).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kalmagrove.scaling.points import Point

LawName = Literal["power", "hoffmann"]
Array = np.ndarray

FORMULAS: dict[str, str] = {
    "power": "perplexity = c N^-alpha D^-beta",
    "hoffmann": "loss = E + A N^-alpha + B D^-beta",
}


@dataclass(frozen=True)
class Design:
    """A law at given points: what its unknowns are multiplied by.

    Attributes:
        law: Which.
        names: Of the unknowns, in order: logarithms of the factors, and the exponents.
        terms: (terms, points, unknowns); the prediction is the log-sum-exp of the products with the unknowns.
        target: What is predicted, (points,): the loss for power, else its logarithm.
        centre: Mean logarithms of parameters and tokens, taken off so that units do not matter to the search.
    """

    law: LawName
    names: tuple[str, ...]
    terms: Array
    target: Array
    centre: tuple[float, float]

    def predict(self, unknowns: Array) -> Array:
        """The target's prediction, (points,)."""
        return np.logaddexp.reduce(self.terms @ unknowns)

    def predict_with_gradient(self, unknowns: Array) -> tuple[Array, Array]:
        """The prediction, (points,), and its derivative by each unknown, (points, unknowns)."""
        values = self.terms @ unknowns
        predicted = np.logaddexp.reduce(values)
        weights = np.exp(values - predicted)
        return predicted, (weights[:, :, None] * self.terms).sum(axis=0)

    def losses(self, predicted: Array) -> Array:
        """Nats a token of a prediction of the target."""
        return predicted if self.law == "power" else np.exp(predicted)

    def take(self, rows: Array) -> Design:
        """The same law at some of the points."""
        return Design(self.law, self.names, self.terms[:, rows], self.target[rows], self.centre)

    def constants(self, unknowns: Array) -> dict[str, float]:
        """The law's constants in the points' own units."""
        found = dict(zip(self.names, map(float, unknowns), strict=True))
        size, data = self.centre
        if self.law == "power":
            shift = found["alpha"] * size + found["beta"] * data
            return {"c": float(np.exp(found["log_c"] + shift))} | _exponents(found)
        return {
            "E": float(np.exp(found["log_E"])),
            "A": float(np.exp(found["log_A"] + found["alpha"] * size)),
            "B": float(np.exp(found["log_B"] + found["beta"] * data)),
        } | _exponents(found)


def _exponents(found: dict[str, float]) -> dict[str, float]:
    return {name: found[name] for name in ("alpha", "beta", "gamma") if name in found}


def make_design(
    law: LawName,
    points: Sequence[Point],
    *,
    worth_of_repetition: float | None = None,
    centre: tuple[float, float] | None = None,
    rank: bool | None = None,
) -> Design:
    """A law at points.

    Args:
        law: Which.
        points: Of one family.
        worth_of_repetition: R*; None counts a repeated token like a new one.
        centre: That of another design, so that its unknowns mean the same here; None is the points' own.
        rank: Whether the rank ratio takes part; None asks whether it differs between the points.
    """
    size = np.log([point.parameters for point in points])
    data = np.log([effective_tokens(point, worth_of_repetition) for point in points])
    ratio = np.log([point.rank_ratio for point in points])
    loss = np.array([point.loss for point in points])
    centre = centre or (float(size.mean()), float(data.mean()))
    one, size, data = np.ones_like(size), size - centre[0], data - centre[1]
    has_rank = bool(np.ptp(ratio) > 0) if rank is None else rank
    if law == "power":
        columns = {"log_c": one, "alpha": -size, "beta": -data} | ({"gamma": -ratio} if has_rank else {})
        return Design(law, tuple(columns), np.stack(list(columns.values()), axis=1)[None], loss, centre)
    names = ("log_E", "log_A", "alpha", "log_B", "beta", *(("gamma",) if has_rank else ()))
    parts: tuple[dict[str, Array], ...] = (
        {"log_E": one},
        {"log_A": one, "alpha": -size, "gamma": -ratio},
        {"log_B": one, "beta": -data},
    )
    zero = np.zeros_like(one)
    terms = np.stack([np.stack([part.get(name, zero) for name in names], axis=1) for part in parts])
    return Design(law, names, terms, np.log(loss), centre)


def predicted_loss(
    constants: Mapping[str, float], parameters: float, tokens: float, *, rank_ratio: float = 1.0
) -> float:
    """Nats a token of a law with given constants: the power law where they have c, else Hoffmann's.

    Args:
        constants: As :attr:`~kalmagrove.scaling.fit.Fit.constants` has them.
        parameters: Of the model.
        tokens: Of the training, repeated ones at what they are worth.
        rank_ratio: Of the model.
    """
    rank = rank_ratio ** -constants.get("gamma", 0.0)
    size, data = parameters ** -constants["alpha"], tokens ** -constants["beta"]
    if "c" in constants:
        return float(np.log(constants["c"] * size * data * rank))
    return constants["E"] + constants["A"] * size * rank + constants["B"] * data


def tokens_for_loss(
    constants: Mapping[str, float], parameters: float, loss: float, *, rank_ratio: float = 1.0
) -> float:
    """Tokens after which a model of this size has this loss; infinity where no number of them is enough."""
    if "c" in constants:
        rest = loss - predicted_loss(constants, parameters, 1.0, rank_ratio=rank_ratio)
        return _exp_or_infinity(-rest / constants["beta"])
    with_all = constants["E"] + constants["A"] * parameters ** -constants["alpha"] * rank_ratio ** -constants.get(
        "gamma", 0.0
    )
    if loss <= with_all:
        return float("inf")
    return _exp_or_infinity(np.log(constants["B"] / (loss - with_all)) / constants["beta"])


def _exp_or_infinity(exponent: float) -> float:
    return float(np.exp(exponent)) if exponent < 700 else float("inf")


def effective_tokens(point: Point, worth_of_repetition: float | None) -> float:
    """Tokens that a run's tokens are worth when some were read again."""
    if worth_of_repetition is None or point.unique_tokens is None:
        return point.tokens
    return worth_of_tokens(point.tokens, point.unique_tokens, worth_of_repetition)


def worth_of_tokens(tokens: float, unique_tokens: float, worth_of_repetition: float) -> float:
    """Different tokens that would be worth as much as these, some of which are read again (arXiv:2305.16264).

    Args:
        tokens: All that are read.
        unique_tokens: Different ones of the text.
        worth_of_repetition: R*.
    """
    if unique_tokens >= tokens:
        return tokens
    again = tokens / unique_tokens - 1
    return float(unique_tokens * (1 + worth_of_repetition * (1 - np.exp(-again / worth_of_repetition))))
