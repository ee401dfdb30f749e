"""Numbers, lists and durations as people write them on the command line and in YAML files."""

from __future__ import annotations

import math
import re
from decimal import Decimal

from kalmagrove.errors import UsageError

MOST_TOKENS = 2**63 - 1
SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
"""What a letter behind a number multiplies it by."""
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def parse_count(text: str | float) -> int:
    """A number such as 2000000, 500k, 2.5m or 1b.

    Raises:
        UsageError: It is not one.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)([kmb]?)", str(text).strip().lower().replace("_", ""))
    if match is None:
        raise UsageError(f"{text!r} is not a number of tokens; write for example 500k, 2m or 1.5b")
    try:
        # Of a float 8.12m would be a token less than 8,120,000.
        count = Decimal(match[1]) * SUFFIXES[match[2]]
    except ArithmeticError:
        # Its exponent is beyond what a Decimal holds.
        count = Decimal("Infinity")
    if count > MOST_TOKENS:
        raise UsageError(f"{text!r} is more than {MOST_TOKENS:,} tokens; write fewer")
    return round(count)


def parse_list(text: str) -> list[str]:
    """What stands between commas, without empty items."""
    return [item.strip() for item in text.split(",") if item.strip()]


def parse_seeds(text: str) -> list[int]:
    """Seeds divided by commas.

    Raises:
        UsageError: One is not a whole number, or comes twice.
    """
    items = parse_list(text)
    seeds = [int(item) for item in items if item.isdecimal()]
    if not seeds or len(seeds) < len(items) or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds must be different whole numbers divided by commas, got {text!r}")
    return seeds


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 90s, 10m, 2h or 1h30m.

    Raises:
        UsageError: It is not one.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text.strip().lower())
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    is_whole = "".join(number + unit for number, unit in parts) == text.strip().lower()
    if not parts or not is_whole or not math.isfinite(seconds):
        raise UsageError(f"{text!r} is not a duration; write for example 90s, 10m or 1h30m")
    return seconds
