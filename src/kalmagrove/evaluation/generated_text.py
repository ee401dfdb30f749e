"""The text of tokens that come one by one: whole characters, and nothing behind a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "\ufffd"


class GeneratedText:
    """Gives each new token's text as soon as it is sure.

    A character of several tokens is given when it is whole, and what may be the beginning of a stop string when it is
    known not to be.

    Args:
        tokenizer: Of the model.
        stop: Texts that end the generation; they and what follows are not given.

    Attributes:
        is_stopped: Whether a stop string came.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # Decoding begins a little before the new tokens: some tokenisers write a first one in another way.
        self._tokens: list[int] = []
        self._decoded = 0
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is sure now."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(UNKNOWN):
            return ""
        self._tokens, self._decoded = self._tokens[self._decoded :], len(self._tokens) - self._decoded
        return self._before_stop(text)

    def rest(self) -> str:
        """What was held back, at the end; a character that is not whole is U+FFFD."""
        text, self._tokens, self._decoded = self._new_text(), [], 0
        return self._before_stop(text) + self._flushed()

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._tokens[: self._decoded])
        return str(self._tokenizer.decode(self._tokens))[len(before) :]

    def _before_stop(self, text: str) -> str:
        self._held += text
        places = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return self._given(min(places), keep=False)
        return self._given(len(self._held) - self._length_of_a_beginning(), keep=True)

    def _length_of_a_beginning(self) -> int:
        """Of the longest end of the held text with which a stop string begins."""
        longest = min(len(self._held), max((len(stop) for stop in self._stop), default=1) - 1)
        ends = (self._held[len(self._held) - length :] for length in range(longest, 0, -1))
        return next((len(end) for end in ends if any(stop.startswith(end) for stop in self._stop)), 0)

    def _given(self, length: int, *, keep: bool) -> str:
        given, self._held = self._held[:length], self._held[length:] if keep else ""
        return given

    def _flushed(self) -> str:
        return self._given(len(self._held), keep=False)
