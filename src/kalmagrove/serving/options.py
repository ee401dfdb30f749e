"""What a server allows; free of heavy imports, so that the command can show the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from kalmagrove.errors import UsageError

MOST_STOPS = 4
"""Stop strings of a request, as in OpenAI's API."""
SECONDS_FOR_A_BODY = 30.0
SECONDS_TO_RETRY = 1


@dataclass(frozen=True)
class ServeLimits:
    """Limits of a server.

    Attributes:
        max_tokens: Most tokens of an answer; a request that asks for more gets so many.
        concurrency: Answers that are generated at once.
        queue: Requests that may wait for one of them to end; more are refused.
        max_body: Largest request in bytes.
        grace: Seconds that running answers have after the server was asked to stop.

    Raises:
        UsageError: A value is out of its range.
    """

    max_tokens: int = 1024
    concurrency: int = 4
    queue: int = 16
    max_body: int = 1 << 20
    grace: float = 20.0

    def __post_init__(self) -> None:
        for name, least in {"max_tokens": 1, "concurrency": 1, "queue": 0, "max_body": 1, "grace": 0}.items():
            value = getattr(self, name)
            if not least <= value < 1 << 40:
                raise UsageError(f"--{name} must be at least {least}, got {value}")
