"""The two errors that a user can cause and mend; the command prints them as one or two lines."""

LONGEST_REASON = 300
"""Characters of another library's error that are passed on."""


class KalmaGroveError(ValueError):
    """Something the user gave cannot be used; the text names it and says what to do.

    Attributes:
        exit_code: Of the command that it ends.
    """

    exit_code = 1


class UsageError(KalmaGroveError):
    """A flag or configuration value is wrong."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What a library's error says first, for the text of one of ours; its kind where it says nothing."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 3] + "..."
