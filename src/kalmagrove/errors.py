"""The two errors that a user can cause and mend; the command prints them as one or two lines."""


class KalmaGroveError(ValueError):
    """Something the user gave cannot be used; the text names it and says what to do."""


class UsageError(KalmaGroveError):
    """A flag or configuration value is wrong; the command exits with code 2."""
