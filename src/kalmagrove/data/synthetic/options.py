"""The names and options of the synthetic tasks, as in ``synthetic:markov,states=64``."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeGuard

from kalmagrove.errors import UsageError
from kalmagrove.quantities import SUFFIXES

PREFIX = "synthetic:"

_COUNT = re.compile(r"(\d{1,19})([kmb]?)")


def _option(default: int, low: int, high: int) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True)
class MarkovOptions:
    """A hierarchical hidden Markov source; `MarkovSource` says what its states do.

    Attributes:
        states: Hidden states, those of all levels multiplied: a whole number to the power of ``levels``.
        levels: Levels of the hierarchy, each with as many values.
        symbols: Words of the language.
        length: Mean tokens of a document, without its end-of-text token.
        tokens: Expected tokens of the training split; valid and test have a fiftieth each, 10 k to 100 k.
        seed: Of the source and of its texts.
    """

    states: int = _option(512, 2, 1024)
    levels: int = _option(3, 1, 10)
    symbols: int = _option(256, 2, 8192)
    length: int = _option(1024, 2, 100_000)
    tokens: int = _option(2_000_000, 1_000, 10**12)
    seed: int = _option(0, 0, 2**63 - 1)

    def __post_init__(self) -> None:
        _check_ranges(self)
        if self.values**self.levels != self.states:
            near = sorted({max(2, self.values + step) ** self.levels for step in (0, 1)} & set(range(1025)))
            raise UsageError(
                f"{PREFIX}markov: states={self.states} is no whole number to the power of levels={self.levels}; use "
                f"for example states={' or states='.join(map(str, near))}"
            )

    @property
    def values(self) -> int:
        """Values of a level."""
        return int(self.states ** (1 / self.levels) + 1e-9)


@dataclass(frozen=True)
class RecallOptions:
    """Associative recall at a distance; `RecallSource` says what a document is.

    Attributes:
        pairs: Pairs of a key and its value in a document.
        queries: Questions for a key in a document.
        keys: Words that may be keys.
        values: Words that may be values.
        distractors: Words of the noise between.
        length: Mean tokens of a document, noise included, without its end-of-text token.
        tokens: Expected tokens of the training split; valid and test have a fiftieth each, 10 k to 100 k.
        seed: Of the texts.
    """

    pairs: int = _option(8, 1, 128)
    queries: int = _option(8, 1, 128)
    keys: int = _option(64, 1, 20_000)
    values: int = _option(64, 1, 20_000)
    distractors: int = _option(64, 1, 20_000)
    length: int = _option(128, 5, 100_000)
    tokens: int = _option(2_000_000, 1_000, 10**12)
    seed: int = _option(0, 0, 2**63 - 1)

    def __post_init__(self) -> None:
        _check_ranges(self)
        if self.pairs > self.keys:
            raise UsageError(f"{PREFIX}recall: pairs={self.pairs} need as many keys, but keys={self.keys}")
        if self.gap < 0:
            needed = 2 * self.pairs + 3 * self.queries
            raise UsageError(
                f"{PREFIX}recall: pairs={self.pairs} and queries={self.queries} take {needed} tokens, but "
                f"length={self.length}; use length={needed} or more"
            )

    @property
    def gap(self) -> float:
        """Mean tokens of noise before each pair and each question."""
        return (self.length - 2 * self.pairs - 3 * self.queries) / (self.pairs + self.queries)


SyntheticOptions = MarkovOptions | RecallOptions
TASKS: dict[str, type[MarkovOptions] | type[RecallOptions]] = {"markov": MarkovOptions, "recall": RecallOptions}


def is_synthetic(source: str | None) -> TypeGuard[str]:
    """Whether a source names a synthetic task."""
    return source is not None and source.startswith(PREFIX)


def parse_synthetic(source: str) -> SyntheticOptions:
    """The options of a source such as ``synthetic:markov,states=64``.

    Raises:
        UsageError: The task, an option or a value is unknown or out of range; all options are listed.
    """
    task, *items = source.removeprefix(PREFIX).split(",")
    if task not in TASKS:
        listed = "; ".join(f"{PREFIX}{name} with {_listed(name)}" for name in TASKS)
        raise UsageError(f"unknown synthetic task {task!r}; there are {listed}")
    given: dict[str, int] = {}
    for item in items:
        name, _, text = item.partition("=")
        if name not in TASKS[task].__dataclass_fields__:
            raise UsageError(f"{PREFIX}{task} has no option {name!r}; its options: {_listed(task)}")
        if name in given:
            raise UsageError(f"{PREFIX}{task}: {name} is given twice")
        match = _COUNT.fullmatch(text)
        if match is None:
            raise UsageError(f"{PREFIX}{task}: {name}={text} is no whole number; its options: {_listed(task)}")
        given[name] = int(match[1]) * SUFFIXES[match[2]]
    return TASKS[task](**given)


def task_of(options: SyntheticOptions) -> str:
    """The name of the task that options belong to."""
    return next(name for name, kind in TASKS.items() if isinstance(options, kind))


def full_name(options: SyntheticOptions) -> str:
    """The source with every option written out: the same for the same text."""
    return ",".join([PREFIX + task_of(options), *(f"{name}={value}" for name, value in asdict(options).items())])


def held_out_tokens(options: SyntheticOptions) -> int:
    """Expected tokens of valid, and of test."""
    return min(max(options.tokens // 50, 10_000), 100_000)


def _check_ranges(options: SyntheticOptions) -> None:
    task = task_of(options)
    for item in fields(options):
        value = getattr(options, item.name)
        if not item.metadata["low"] <= value <= item.metadata["high"]:
            raise UsageError(f"{PREFIX}{task}: {item.name}={value} is out of range; its options: {_listed(task)}")


def _listed(task: str) -> str:
    return ", ".join(
        f"{item.name}={item.default} ({item.metadata['low']} to {item.metadata['high']})"
        for item in fields(TASKS[task])
    )
