"""Associative recall at a distance: pairs of keys and values in noise, then questions for the values of keys."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kalmagrove.data.synthetic.draws import UniformDraws
from kalmagrove.data.synthetic.hidden_markov import HiddenMarkov, foreign_text
from kalmagrove.data.synthetic.options import RecallOptions
from kalmagrove.data.synthetic.words import END, FIRST_WORD

NOISE, KEY, VALUE, QUESTION = 1, 2, 3, 4
"""Kinds of tokens, beside `END`."""
BATCH_TOKENS = 1 << 20
NO_KEY = -1


@dataclass(frozen=True)
class Answer:
    """A value that follows a question, and can be known from the window that it stands in.

    Attributes:
        place: Of the value in the window.
        distance: Tokens from the last mention of the key, with its value, to this one; 1 is the next token.
        pairs: Keys that were mentioned in the document so far, as much of it as the window shows.
    """

    place: int
    distance: int
    pairs: int


@dataclass(frozen=True)
class RecallSource:
    """Documents of associative recall, and the best prediction of any window of them.

    A document has ``pairs`` pairs, each a key and its value, and then ``queries`` questions, each a question mark, a
    key and its value. Before each pair and each question stand words of noise, as many as a geometric distribution
    gives. The keys of a document are all different, each new one drawn from those that are left; its values, the
    words of noise and the keys that are asked for are drawn independently, all alike.

    The kind of each token is plain to see, and the kinds are a hidden Markov chain over the places of a document's
    plan, so the best prediction of the next kind, whatever place a window begins at, is the forward algorithm's. The
    best prediction of the word, given its kind, follows from what the window has shown of the present document: an
    answer is certain where its key was mentioned with its value, and open where not; a key that is asked for is any of
    the mentioned ones with the chance 1 / pairs each, and else any of the others. A value that begins a window belongs
    to a key that nobody saw, so each key is kept as a possibility, weighted by Bayes' rule.

    Attributes:
        options: All that it depends on.
    """

    options: RecallOptions

    @property
    def words(self) -> list[str]:
        """The language's words, in the order of their tokens: ?, keys, values, noise."""
        chosen = self.options
        named = {"k": chosen.keys, "v": chosen.values, "n": chosen.distractors}
        return ["?", *(f"{letter}{number}" for letter, count in named.items() for number in range(count))]

    @property
    def first_key(self) -> int:
        """Token of the first key."""
        return FIRST_WORD + 1

    @property
    def first_value(self) -> int:
        """Token of the first value."""
        return self.first_key + self.options.keys

    @property
    def first_noise(self) -> int:
        """Token of the first word of noise."""
        return self.first_value + self.options.values

    @cached_property
    def kinds(self) -> np.ndarray:
        """Kind of each token of the vocabulary, (tokens,)."""
        kinds = np.full(self.first_noise + self.options.distractors, NOISE)
        kinds[self.first_key : self.first_value] = KEY
        kinds[self.first_value : self.first_noise] = VALUE
        kinds[FIRST_WORD], kinds[END] = QUESTION, END
        return kinds

    @cached_property
    def plan(self) -> HiddenMarkov:
        """The chain over the places of a document: its tokens are kinds, its last state the end."""
        parts = [(NOISE, KEY, VALUE)] * self.options.pairs + [(NOISE, QUESTION, KEY, VALUE)] * self.options.queries
        kinds = [kind for part in parts for kind in part] + [END]
        states, noise = len(kinds), self.options.gap / (1 + self.options.gap)
        transition = np.zeros((states, states))
        for state, kind in enumerate(kinds):
            following = (state + 1) % states
            if kind == NOISE:
                transition[state, state], transition[state, following] = noise, 1 - noise
            elif kinds[following] == NOISE:
                transition[state, following], transition[state, following + 1] = noise, 1 - noise
            else:
                transition[state, following] = 1.0
        return HiddenMarkov(transition, np.eye(QUESTION + 1)[kinds])

    def documents(self, stream: int, expected_tokens: int) -> Iterator[np.ndarray]:
        """Tokens of documents, without end-of-text tokens.

        Args:
            stream: Number of the random stream; those of different streams are independent.
            expected_tokens: Of all documents with their ends; sets how many there are.
        """
        left = max(1, round(expected_tokens / (self.options.length + 1)))
        at_once = max(1, BATCH_TOKENS // max(self.options.length, self.options.keys))
        for number, count in enumerate([at_once] * (left // at_once) + [left % at_once]):
            if count:
                yield from self._batch(count, UniformDraws(self.options.seed, stream, number))

    def _batch(self, count: int, draws: UniformDraws) -> list[np.ndarray]:
        chosen = self.options
        gaps = draws.geometric(chosen.gap, count, chosen.pairs + chosen.queries)
        sizes = np.array([2] * chosen.pairs + [3] * chosen.queries)
        ends = (gaps + sizes).ravel().cumsum().reshape(gaps.shape)
        keys = np.argsort(draws.uniform(count, chosen.keys), axis=1, kind="stable")[:, : chosen.pairs]
        values = draws.below(chosen.values, count, chosen.pairs)
        asked = draws.below(chosen.pairs, count, chosen.queries)
        tokens = self.first_noise + draws.below(chosen.distractors, int(ends[-1, -1]))
        tokens[ends - 2] = self.first_key + np.concatenate([keys, np.take_along_axis(keys, asked, axis=1)], axis=1)
        tokens[ends - 1] = self.first_value + np.concatenate(
            [values, np.take_along_axis(values, asked, axis=1)], axis=1
        )
        tokens[ends[:, chosen.pairs :] - 3] = FIRST_WORD
        return np.split(tokens, ends[:-1, -1])

    def window_nats(self, windows: np.ndarray) -> np.ndarray:
        """Nats that the best predictor spends on each token of windows but the first.

        It knows the source and nothing but the window, which may begin anywhere in a document.

        Args:
            windows: Tokens, (n, t).

        Returns:
            float64, (n, t - 1).

        Raises:
            KalmaGroveError: A window cannot come from this source.
        """
        words = np.array([self._word_nats(window) for window in windows.tolist()])
        return self.plan.window_nats(self.kinds[windows]) + words[:, 1:]

    def answers(self, window: list[int]) -> list[Answer]:
        """The answers that can be known from a window.

        Args:
            window: Tokens.
        """
        found: list[Answer] = []
        mentioned: dict[int, int] = {}
        kinds = self.kinds[window].tolist()
        for place, kind in enumerate(kinds):
            if kind == END:
                mentioned = {}
            elif kind == VALUE and place:
                key = window[place - 1]
                if key in mentioned and place > 1 and kinds[place - 2] == QUESTION:
                    found.append(Answer(place, place - mentioned[key], len(mentioned)))
                mentioned[key] = place
        return found

    def entropy_rate(self) -> float:
        """Nats a token of an endless text, of which all is seen: a document's over its mean length."""
        chosen = self.options
        gap = chosen.gap
        gap_nats = (1 + gap) * math.log1p(gap) - (gap * math.log(gap) if gap else 0.0)
        nats = (chosen.pairs + chosen.queries) * (gap_nats + gap * math.log(chosen.distractors))
        nats += sum(math.log(chosen.keys - drawn) + math.log(chosen.values) for drawn in range(chosen.pairs))
        nats += chosen.queries * math.log(chosen.pairs)
        return nats / (chosen.length + 1)

    def _word_nats(self, window: list[int]) -> list[float]:
        """Nats of each token of a window, given its kind; those of the first have no meaning."""
        kinds = self.kinds[window].tolist()
        memory = _Memory(self)
        if kinds[0] == VALUE:
            memory.begin_with_value(window[0])
        nats = [0.0]
        for place in range(1, len(window)):
            token, kind, before = window[place], kinds[place], kinds[place - 1]
            if kind == END:
                memory = _Memory(self)
            if kind == KEY:
                nats.append(memory.see_key(token, is_asked=before == QUESTION))
            elif kind == VALUE:
                nats.append(memory.see_value(window[place - 1], token))
            else:
                nats.append(math.log(self.options.distractors) if kind == NOISE else 0.0)
        return nats


class _Memory:
    """What a window has shown of the present document, and whose value its first token may be."""

    def __init__(self, source: RecallSource) -> None:
        self._source, self._options = source, source.options
        self._mentioned: dict[int, int] = {}
        self._first_value = NO_KEY
        self._owners = np.array([NO_KEY])
        self._weights = np.ones(1)
        # Whether each possible owner of the first value is a key that was not mentioned yet.
        self._is_new = np.array([False])

    def begin_with_value(self, value: int) -> None:
        """The value of a key that the window does not show; any key may be its."""
        self._first_value = value
        self._owners = self._source.first_key + np.arange(self._options.keys)
        self._weights = np.full(self._options.keys, 1 / self._options.keys)
        self._is_new = np.full(self._options.keys, True)

    def see_key(self, key: int, *, is_asked: bool) -> float:
        """Nats of a key that is asked for, or of a new one."""
        pairs = self._options.pairs
        is_owner = self._owners == key
        known = len(self._mentioned) + self._is_new
        others = np.maximum(self._options.keys - known, 1)
        if not is_asked:
            return self._update(np.where(is_owner, 0.0, 1 / others))
        other = np.maximum(pairs - known, 0) / pairs / others
        return self._update(np.where(is_owner | (key in self._mentioned), 1 / pairs, other))

    def see_value(self, key: int, value: int) -> float:
        """Nats of the value that follows a key, which is mentioned from here on."""
        if key in self._mentioned:
            return self._update(np.full(len(self._owners), float(value == self._mentioned[key])))
        own = float(value == self._first_value)
        nats = self._update(np.where(self._owners == key, own, 1 / self._options.values))
        self._mentioned[key] = value
        self._is_new &= self._owners != key
        return nats

    def _update(self, chances: np.ndarray) -> float:
        joint = self._weights * chances
        total = float(joint.sum())
        if total == 0.0:
            raise foreign_text()
        self._weights = joint / total
        return -math.log(min(total, 1.0))
