"""Random numbers that are the same in every version of NumPy, and choices from many distributions at once."""

from __future__ import annotations

import numpy as np

_BITS = 40
"""Of a uniform number: with the number of a row before them they still fit a float64 exactly."""


class UniformDraws:
    """A stream of uniform numbers.

    Args:
        key: Whole numbers, not negative, that choose the stream.
    """

    def __init__(self, *key: int) -> None:
        # Only the raw stream of a bit generator is the same in all NumPy versions.
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, *shape: int) -> np.ndarray:
        """float64 from 0, included, to 1, excluded."""
        raw = self._bits.random_raw(int(np.prod(shape)))
        return (raw >> np.uint64(64 - _BITS)).reshape(shape) * 2.0**-_BITS

    def below(self, bound: int, *shape: int) -> np.ndarray:
        """int64 from 0 to ``bound``, excluded, all alike."""
        return (self.uniform(*shape) * bound).astype(np.int64)

    def geometric(self, mean: float, *shape: int) -> np.ndarray:
        """int64 from 0, geometric: each further step has the same chance ``mean / (1 + mean)``."""
        if mean <= 0:
            return np.zeros(shape, dtype=np.int64)
        return np.floor(np.log1p(-self.uniform(*shape)) / -np.log1p(1 / mean)).astype(np.int64)

    def distributions(self, *shape: int, sparsity: float) -> np.ndarray:
        """Distributions over the last axis: normalised powers of exponential numbers.

        With power 1 they are uniform over all distributions, Dirichlet(1, ..., 1); with larger ones most of the
        probability lies on a few entries, as with Dirichlet parameters below 1, but none has exactly none.

        Args:
            shape: Of the array.
            sparsity: The power.
        """
        weights = np.maximum(-np.log1p(-self.uniform(*shape)), 2.0**-_BITS) ** sparsity
        return weights / weights.sum(axis=-1, keepdims=True)


class RowChoices:
    """Draws from the rows of a matrix of distributions.

    Args:
        rows: (rows, entries), each row a distribution.
    """

    def __init__(self, rows: np.ndarray) -> None:
        cumulative = rows.cumsum(axis=-1)
        # The last entry that has a chance ends exactly at 1.
        cumulative /= cumulative[:, -1:]
        self._entries = rows.shape[1]
        self._flat = (cumulative + np.arange(len(rows))[:, None]).ravel()

    def draw(self, rows: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """One entry for each of many rows.

        Args:
            rows: Numbers of rows, (draws,).
            uniform: A uniform number for each, (draws,).
        """
        return np.searchsorted(self._flat, rows + uniform, side="right") - rows * self._entries
