"""Hidden Markov models: exact prediction by the forward algorithm, and paths of states.

Letters: n windows, t tokens of a window, s states, v tokens of the vocabulary. The forward algorithm in its scaled form
is that of Rabiner, "A tutorial on hidden Markov models and selected applications in speech recognition" (1989), V.A.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kalmagrove.data.synthetic.draws import RowChoices, UniformDraws
from kalmagrove.errors import KalmaGroveError

BELIEF_BUDGET = 1 << 19
"""Numbers of the beliefs that are held at once."""


@dataclass(frozen=True, eq=False)
class HiddenMarkov:
    """States that follow one another and are seen through the tokens that they emit.

    Attributes:
        transition: Chances of the next state, (s, s); one state at least can be reached from all.
        emission: Chances of the token, (s, v).
    """

    transition: np.ndarray
    emission: np.ndarray

    @cached_property
    def stationary(self) -> np.ndarray:
        """Chances of the state at a random place of an endless text, (s,)."""
        states = len(self.transition)
        equations = self.transition.T - np.eye(states)
        equations[-1] = 1.0
        solution = np.linalg.solve(equations, np.eye(states)[-1])
        return np.maximum(solution, 0.0) / np.maximum(solution, 0.0).sum()

    def predictions(
        self, windows: np.ndarray, start: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The forward algorithm: what is known of each state before its token is seen.

        Args:
            windows: Tokens, (n, t).
            start: Chances of the first state, (s,) or (n, s); left out: the stationary ones.

        Yields:
            For each place of the windows, the chances of the state given the tokens before, (n, s), and the
            probability of the token that stands there, (n,).

        Raises:
            KalmaGroveError: A window cannot come from this source.
        """
        by_token = np.ascontiguousarray(self.emission.T)
        first = self.stationary if start is None else start
        predicted = np.broadcast_to(first, (len(windows), len(self.transition)))
        for place in range(windows.shape[1]):
            belief = predicted * by_token[windows[:, place]]
            probability = belief.sum(axis=1)
            if not probability.all():
                raise foreign_text()
            yield predicted, probability
            predicted = (belief / probability[:, None]) @ self.transition

    def window_nats(self, windows: np.ndarray) -> np.ndarray:
        """Nats that the best predictor spends on each token of windows but the first.

        It knows the source and nothing but the window: the state at its beginning has its stationary chances.

        Args:
            windows: Tokens, (n, t).

        Returns:
            float64, (n, t - 1).

        Raises:
            KalmaGroveError: A window cannot come from this source.
        """
        at_once = max(1, BELIEF_BUDGET // len(self.transition))
        parts = [windows[first : first + at_once] for first in range(0, len(windows), at_once)]
        return np.concatenate([self._nats(part) for part in parts])

    def _nats(self, windows: np.ndarray) -> np.ndarray:
        probabilities = [probability for _, probability in self.predictions(windows)]
        return -np.log(np.stack(probabilities[1:], axis=1))

    def sample_windows(self, count: int, length: int, draws: UniformDraws) -> tuple[np.ndarray, np.ndarray]:
        """Windows from random places of an endless text.

        Returns:
            Tokens (count, length), and the state at each window's first token, (count,).
        """
        first = RowChoices(self.stationary[None]).draw(np.zeros(count, dtype=np.int64), draws.uniform(count))
        states = np.concatenate(sample_paths(RowChoices(self.transition), first, np.full(count, length), draws))
        tokens = RowChoices(self.emission).draw(states, draws.uniform(len(states)))
        return tokens.reshape(count, length), first


def foreign_text() -> KalmaGroveError:
    """The error for a text that a source gives no chance to."""
    return KalmaGroveError("the text cannot come from this synthetic source; score it as an ordinary text file")


def sample_paths(
    transition: RowChoices, first: np.ndarray, lengths: np.ndarray, draws: UniformDraws
) -> list[np.ndarray]:
    """Paths of states, all of them a step at a time.

    Args:
        transition: Chances of the next state.
        first: First state of each path, (paths,).
        lengths: States of each path, at least 1, (paths,).
        draws: Random numbers.
    """
    order = np.argsort(-lengths, kind="stable")
    # How many paths have a state at each step: the longest stand first, so these are the first ones.
    going = len(lengths) - np.searchsorted(np.sort(lengths), np.arange(lengths.max()), side="right")
    steps = [first[order]]
    for count in going[1:]:
        steps.append(transition.draw(steps[-1][:count], draws.uniform(count)))
    states = np.concatenate(steps)
    offsets = np.concatenate([[0], going.cumsum()[:-1]])
    paths: list[np.ndarray] = [first] * len(lengths)
    for place, path in enumerate(order):
        paths[path] = states[offsets[: lengths[path]] + place]
    return paths
