"""Words that a layer knows, checked: a mistyped one would silently build another layer."""

from __future__ import annotations

from typing import Any, get_args


def check_choice(what: str, word: str, known: Any) -> None:
    """Refuses a word that is not among those of a ``Literal``.

    Raises:
        ValueError: It is unknown.
    """
    words = get_args(known)
    if word not in words:
        raise ValueError(f"{what} must be {', '.join(words[:-1])} or {words[-1]}, got {word!r}")
