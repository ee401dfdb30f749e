"""Names of adaptors, which are names of folders too."""

from __future__ import annotations

import re

from kalmagrove.errors import UsageError

LONGEST_NAME = 64
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def check_name(name: str) -> None:
    """That a name can be a folder's everywhere.

    Raises:
        UsageError: It is empty, too long, or has other characters than letters, digits, dots, dashes and underscores.
    """
    if _NAME.fullmatch(name) is None or len(name) > LONGEST_NAME:
        raise UsageError(
            f"an adaptor's name has at most {LONGEST_NAME} letters, digits, dots, dashes and underscores and begins "
            f"with a letter, a digit or an underscore; got {name!r}"
        )
