"""The kinds of columns: how each reads a cell and writes a value."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from kalmagrove.data.tables.cells import Cell, cell_number, cell_text, shown
from kalmagrove.data.tables.dates import DateFormat, parse_date
from kalmagrove.data.tables.number_scale import NumberScale


@dataclass(frozen=True)
class NumberColumn:
    """Numbers.

    Attributes:
        name: Of the column.
        has_missing: Whether some training row lacks it.
        scale: Of the training values.
        decimals: Digits behind the point of a value that is written; None is all.
    """

    kind: ClassVar[str] = "number"
    name: str
    has_missing: bool
    scale: NumberScale
    decimals: int | None

    def read(self, cell: Cell) -> float:
        """The number of a cell.

        Raises:
            ValueError: It is none.
        """
        return cell_number(cell)

    def show(self, value: float) -> float:
        """A value as the column writes it."""
        if self.decimals is None:
            return value
        rounded = round(value, self.decimals)
        return int(rounded) if self.decimals == 0 else rounded


@dataclass(frozen=True)
class DateColumn:
    """Dates or times, as numbers of seconds since 1970.

    Attributes:
        name: Of the column.
        has_missing: Whether some training row lacks it.
        scale: Of the training values.
        format: How they are written.
    """

    kind: ClassVar[str] = "date"
    name: str
    has_missing: bool
    scale: NumberScale
    format: DateFormat

    def read(self, cell: Cell) -> float:
        """The seconds of a cell.

        Raises:
            ValueError: It is no ISO date, or only one of it and the column has a time zone.
        """
        found = parse_date(cell_text(cell).strip())
        if found is None:
            raise ValueError(f"{shown(cell)} is no ISO date such as 2024-01-31 or 2024-01-31 23:59:59")
        seconds, form = found
        self.format.joined(form)
        return seconds

    def show(self, value: float) -> str:
        """A value as the column writes it."""
        return self.format.show(value)


@dataclass(frozen=True)
class CategoryColumn:
    """Texts of which there are few different ones.

    Attributes:
        name: Of the column.
        has_missing: Whether some training row lacks it.
        values: The different ones.
    """

    kind: ClassVar[str] = "category"
    name: str
    has_missing: bool
    values: tuple[str, ...]

    @cached_property
    def _places(self) -> dict[str, int]:
        return {value: place for place, value in enumerate(self.values)}

    @cached_property
    def _truth_values(self) -> dict[str, int]:
        """By small letters: one tool writes True, another true or TRUE."""
        places = {value.lower(): place for value, place in self._places.items()}
        return places if len(places) == len(self.values) and places.keys() <= {"true", "false"} else {}

    def read(self, cell: Cell) -> int | None:
        """Which of the values a cell is; None is one that no training row had."""
        text = cell_text(cell).strip()
        return self._places.get(text, self._truth_values.get(text.lower()))

    def show(self, value: int) -> str:
        """A value as the column writes it."""
        return self.values[value]


@dataclass(frozen=True)
class TextColumn:
    """Texts of any kind.

    Attributes:
        name: Of the column.
        has_missing: Whether some training row lacks it.
    """

    kind: ClassVar[str] = "text"
    name: str
    has_missing: bool

    def read(self, cell: Cell) -> str:
        """The text of a cell."""
        return cell_text(cell)

    def show(self, value: str) -> str:
        """A value as the column writes it."""
        return value


Column = NumberColumn | DateColumn | CategoryColumn | TextColumn


def is_numeric(column: Column) -> bool:
    """Whether a column's values are numbers to a model."""
    return isinstance(column, NumberColumn | DateColumn)


def column_to_json(column: Column) -> dict[str, Any]:
    """What :func:`column_from_json` reads: plain JSON."""
    found: dict[str, Any] = json.loads(json.dumps({"kind": column.kind, **asdict(column)}))
    return found


def column_from_json(value: Any) -> Column:
    """A column of a schema.

    Raises:
        ValueError: Something is missing, is too much, or is not what it must be.
    """
    options = dict(_typed(value, dict, "a column"))
    kind = options.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"a column's kind must be one of {', '.join(_KINDS)}, got {kind!r}")
    _require_names(options, _FIELDS[kind], f"a column of kind {kind}")
    name = _typed(options["name"], str, "a column's name")
    try:
        _typed(options["has_missing"], bool, "has_missing")
        if "scale" in options:
            options["scale"] = _scale_from_json(options["scale"])
        if kind == "number" and options["decimals"] is not None and _typed(options["decimals"], int, "decimals") < 0:
            raise ValueError("decimals must not be negative")
        if kind == "date":
            options["format"] = _format_from_json(options["format"])
        if kind == "category":
            options["values"] = _values_from_json(options["values"])
    except ValueError as error:
        raise ValueError(f"column {name!r}: {error}") from error
    found: Column = _KINDS[kind](**options)
    return found


def _names_of(kind: Any) -> tuple[str, ...]:
    return tuple(own.name for own in fields(kind))


_KINDS: dict[str, Any] = {kind.kind: kind for kind in (NumberColumn, DateColumn, CategoryColumn, TextColumn)}
_FIELDS = {name: _names_of(kind) for name, kind in _KINDS.items()}


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{what} must be {kind.__name__}, got {shown(value)}")
    return value


def _require_names(options: dict[str, Any], names: tuple[str, ...], what: str) -> None:
    if set(options) != set(names):
        raise ValueError(f"{what} has {', '.join(names)}; got {', '.join(map(str, options)) or 'nothing'}")


def _scale_from_json(value: Any) -> NumberScale:
    options = _typed(value, dict, "scale")
    _require_names(options, _names_of(NumberScale), "a scale")
    lists = {
        name: tuple(_number(item) for item in _typed(options[name], list, name))
        for name in ("knots", "lows", "highs", "means")
    }
    return NumberScale(centre=_number(options["centre"]), spread=_number(options["spread"]), **lists)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a scale holds numbers, got {shown(value)}")
    return float(value)


def _format_from_json(value: Any) -> DateFormat:
    options = _typed(value, dict, "format")
    _require_names(options, _names_of(DateFormat), "a format")
    form = DateFormat(
        _typed(options["separator"], str, "separator"),
        _typed(options["digits"], int, "digits"),
        _typed(options["zone"], str, "zone"),
    )
    # A format that cannot be read back is none.
    if not -1 <= form.digits <= 6 or parse_date(form.show(0.0)) is None:
        raise ValueError(f"there is no format of dates with {options}")
    return form


def _values_from_json(value: Any) -> tuple[str, ...]:
    values = tuple(_typed(item, str, "a category") for item in _typed(value, list, "values"))
    if not values or len(set(values)) < len(values):
        raise ValueError("its values must be different, and at least one")
    return values
