"""A hierarchical hidden Markov source: topics, phrases within them, classes of words within these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kalmagrove.data.synthetic.draws import RowChoices, UniformDraws
from kalmagrove.data.synthetic.hidden_markov import HiddenMarkov, sample_paths
from kalmagrove.data.synthetic.options import MarkovOptions
from kalmagrove.data.synthetic.words import END, FIRST_WORD

STAY = 16
"""A level moves so many times as rarely as the one below it."""
LEVEL_SPARSITY, WORD_SPARSITY = 6.0, 4.0
"""As in `UniformDraws.distributions`: of the chances of a level's values, and of the words."""
BATCH_TOKENS = 1 << 20


@dataclass(frozen=True)
class MarkovSource:
    """The hidden Markov model of a set of options, and its documents.

    The state is a value for each level, the slowest first. At every token the last level moves; every 16th, on
    average, the level above it moves too; every 256th the next one; and so on. The slowest level that moves goes to a
    new value by chances that depend on its value and on the value of the level above, which stays; the faster levels
    start anew, by chances that depend on the new value of the level above each. The word depends on the last level.
    With three levels, these are topics, phrases and classes of words: a word hints at its class, the sequence of
    classes tells the phrase, and only the sequence of phrases, over hundreds of tokens, tells the topic, which tells
    the phrases to come.

    So longer context pays at every length, as far as it can. What all tokens before a place tell about those after it
    is at most log(states) nats, and the losses of the best predictors with 1, 2, 3, ... tokens of context, each minus
    the entropy rate, sum to no more than that: with n tokens of context the best loss is within log(states) / n of the
    entropy rate. Levels whose time scales grow by a constant factor give each order of magnitude its part.

    A document ends after each of its tokens with the chance 1 / length, and the next one starts anew. The end is a
    state of the source that emits the end-of-text token, so a stream of documents is one stationary hidden Markov
    chain, and the best loss on any window of it can be computed.

    Attributes:
        options: All that it depends on.
    """

    options: MarkovOptions

    @property
    def words(self) -> list[str]:
        """The language's words, in the order of their tokens."""
        return [f"s{number}" for number in range(self.options.symbols)]

    @cached_property
    def model(self) -> HiddenMarkov:
        """The source as a chain over its states, and the end of a document as the last one; tokens as in the text."""
        states, ending = self.options.states, 1 / self.options.length
        transition = np.zeros((states + 1, states + 1))
        transition[:-1, :-1] = (1 - ending) * self._moves
        transition[:-1, -1] = ending
        transition[-1, :-1] = self._beginnings
        emission = np.zeros((states + 1, FIRST_WORD + self.options.symbols))
        emission[:-1, FIRST_WORD:] = self._emissions
        emission[-1, END] = 1.0
        return HiddenMarkov(transition, emission)

    def window_nats(self, windows: np.ndarray) -> np.ndarray:
        """The best predictor's nats: see `HiddenMarkov.window_nats`."""
        return self.model.window_nats(windows)

    def documents(self, stream: int, expected_tokens: int) -> Iterator[np.ndarray]:
        """Tokens of documents, without end-of-text tokens.

        Args:
            stream: Number of the random stream; those of different streams are independent.
            expected_tokens: Of all documents with their ends; sets how many there are.
        """
        length = self.options.length
        left = max(1, round(expected_tokens / (length + 1)))
        at_once = max(1, BATCH_TOKENS // length)
        for number, count in enumerate([at_once] * (left // at_once) + [left % at_once]):
            if count:
                yield from self._batch(count, UniformDraws(self.options.seed, stream, number))

    def _batch(self, count: int, draws: UniformDraws) -> list[np.ndarray]:
        lengths = 1 + draws.geometric(self.options.length - 1, count)
        beginning = RowChoices(self._beginnings[None]).draw(np.zeros(count, dtype=np.int64), draws.uniform(count))
        paths = sample_paths(self._move_choices, beginning, lengths, draws)
        states = np.concatenate(paths)
        tokens = self._emission_choices.draw(states, draws.uniform(len(states))) + FIRST_WORD
        return np.split(tokens, lengths.cumsum()[:-1])

    @cached_property
    def _move_choices(self) -> RowChoices:
        return RowChoices(self._moves)

    @cached_property
    def _emission_choices(self) -> RowChoices:
        return RowChoices(self._emissions)

    @cached_property
    def _values(self) -> np.ndarray:
        """Value of each level in each state, (levels, states)."""
        return np.stack(np.unravel_index(np.arange(self.options.states), (self.options.values,) * self.options.levels))

    @cached_property
    def _tables(self) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """By level, chances of moves (value above, value, new value) and of starts (value above, value); words."""
        values, levels = self.options.values, self.options.levels
        draws = UniformDraws(self.options.seed, 0)
        moves, starts = [], []
        for level in range(levels):
            above = values if level else 1
            moves.append(draws.distributions(above, values, values, sparsity=LEVEL_SPARSITY))
            starts.append(draws.distributions(above, values, sparsity=LEVEL_SPARSITY))
        return moves, starts, draws.distributions(values, self.options.symbols, sparsity=WORD_SPARSITY)

    @cached_property
    def _moves(self) -> np.ndarray:
        """Chances of the next state within a document, (states, states)."""
        moves, _, _ = self._tables
        values, levels = self._values, self.options.levels
        transition = np.zeros((self.options.states,) * 2)
        unmoved = np.ones_like(transition)
        for level in range(levels):
            above = values[level - 1] if level else np.zeros_like(values[0])
            chance = STAY ** -float(levels - 1 - level) - (STAY ** -float(levels - level) if level else 0.0)
            moved = moves[level][above[:, None], values[level][:, None], values[level][None, :]]
            transition += chance * unmoved * moved * self._started_below(level)[None, :]
            unmoved *= values[level][:, None] == values[level][None, :]
        return transition

    @cached_property
    def _beginnings(self) -> np.ndarray:
        """Chances of a document's first state, (states,)."""
        return self._started_below(-1)

    def _started_below(self, level: int) -> np.ndarray:
        """Chances of the values of the levels below one that has its value, (states,)."""
        _, starts, _ = self._tables
        chances = np.ones(self.options.states)
        for below in range(level + 1, self.options.levels):
            above = self._values[below - 1] if below else np.zeros_like(self._values[0])
            chances = chances * starts[below][above, self._values[below]]
        return chances

    @cached_property
    def _emissions(self) -> np.ndarray:
        """Chances of the words, (states, symbols)."""
        _, _, words = self._tables
        return words[self._values[-1]]
