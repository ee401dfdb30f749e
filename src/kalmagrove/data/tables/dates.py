"""ISO 8601 dates and times as numbers, and back in the format that they came in."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1)
_FIRST, _LAST = ((moment - _EPOCH) // timedelta(microseconds=1) for moment in (datetime.min, datetime.max))
_DATE = re.compile(
    r"\d{4}-\d{2}-\d{2}(?:(?P<separator>[T ])\d{2}:\d{2}(?P<seconds>:\d{2}(?:\.(?P<fraction>\d{1,6}))?)?"
    r"(?P<zone>Z|[+-]\d{2}:\d{2})?)?"
)
_MINUTES = -1


@dataclass(frozen=True)
class DateFormat:
    """How a column writes its dates.

    Attributes:
        separator: Between date and time, "T" or a space; empty where there is no time.
        digits: Of a second's fraction, 0 to 6; -1 where there are no seconds.
        zone: Empty, "Z" or an offset such as "+02:00".
    """

    separator: str = ""
    digits: int = _MINUTES
    zone: str = ""

    def joined(self, other: DateFormat) -> DateFormat:
        """A format that can write the dates of both; the first separator and zone stay.

        Raises:
            ValueError: One has a time zone, the other has none.
        """
        if bool(self.zone) != bool(other.zone):
            raise ValueError("some of its dates have a time zone and some have none")
        return DateFormat(self.separator or other.separator, max(self.digits, other.digits), self.zone)

    def show(self, seconds: float) -> str:
        """The text of a number of seconds since 1970, to the nearest that the format can write."""
        # In whole microseconds, which a float holds for centuries around 1970.
        unit = (
            86_400_000_000 if not self.separator else 60_000_000 if self.digits == _MINUTES else 10 ** (6 - self.digits)
        )
        # A float rounds the last moment of the year 9999 into the next, which no date can say.
        microseconds = min(max(round(seconds * 1e6), _FIRST), _LAST)
        moment = _EPOCH + timedelta(microseconds=min((microseconds + unit // 2) // unit * unit, _LAST // unit * unit))
        if not self.separator:
            return moment.date().isoformat()
        if self.zone not in ("", "Z"):
            hours, minutes = int(self.zone[1:3]), int(self.zone[4:])
            offset = timedelta(hours=hours, minutes=minutes)
            with suppress(OverflowError):
                moment = moment + offset if self.zone[0] == "+" else moment - offset
        precision = "minutes" if self.digits == _MINUTES else "seconds" if self.digits == 0 else "microseconds"
        text = moment.isoformat(sep=self.separator, timespec=precision)
        return (text[: len(text) - 6 + self.digits] if self.digits > 0 else text) + self.zone


def parse_date(text: str) -> tuple[float, DateFormat] | None:
    """Seconds since 1970 (as the time is written, or of UTC where it has a zone) and the format; None is no date."""
    match = _DATE.fullmatch(text)
    if match is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
    # A month or an hour that does not exist, or a zone that leads before the year 1.
    except (ValueError, OverflowError):
        return None
    digits = len(match["fraction"] or "") if match["seconds"] else _MINUTES
    seconds = (moment - _EPOCH) / timedelta(seconds=1)
    return seconds, DateFormat(match["separator"] or "", digits, match["zone"] or "")
