"""Hostile inputs, made from valid ones: values that no file of ours holds, and bytes that were changed."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from kalmagrove.errors import KalmaGroveError

INPUTS = int(os.environ.get("KALMAGROVE_FAULT_INPUTS", "10000"))
FRESH = os.environ.get("KALMAGROVE_FAULT_FRESH") == "1"
LONGEST_SECONDS = 30
MOST_BYTES = 1 << 30
"""Memory beyond what the process has already; the largest input here is a few hundred kilobytes."""

ASKED_FOR_MEMORY = re.compile(r"allocat|memoryerror|(of|enough) memory", re.IGNORECASE)
"""In the errors of libraries that were refused it."""

# One draw for each input: many dependent ones are slow, and fail by themselves where memory is refused.
_RANDOMS = st.integers(0, 2**64 - 1).map(Random)

DEEP = "nested too deeply"
_DEPTH = 5_000
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    0.5,
    2**31,
    2**63,
    -(2**63),
    10**30,
    10**400,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "1",
    "nan",
    "train",
    "../../etc/passwd",
    "a\0b",
    "\ud800",
    "two\nlines",
    "x" * 5000,
    "9" * 5000,
    "1e999",
    [],
    {},
    [1, 2, 3],
    [[]] * 50,
    {"a": {"b": [None]}},
    DEEP,
]
CHUNKS = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"\n",
    b"[" * _DEPTH,
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b'"',
    b"}",
    b"\xed\xa0\x80",
    b": ",
]


def inputs(share: float) -> settings:
    """The settings of a test that makes this share of all inputs."""
    return settings(
        max_examples=max(10, round(INPUTS * share)),
        derandomize=not FRESH,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def hostile_value(value: Any) -> st.SearchStrategy[Any]:
    """A JSON value in which one to three places hold something else, or are missing."""
    return _RANDOMS.map(partial(_changed_value, value, list(_places(value, ()))))


def _changed_value(value: Any, places: list[tuple[Any, ...]], random: Random) -> Any:
    result = copy.deepcopy(value)
    for _ in range(random.randint(1, 3)):
        result = _with_change(result, random.choice(places), random.choice(VALUES), random.randint(0, 9))
    return result


def hostile_json(value: Any) -> st.SearchStrategy[bytes]:
    """A hostile value as a document, or the document of a valid one with changed bytes."""
    return st.one_of(
        hostile_value(value).map(dumped), hostile_value(value).map(dumped), hostile_bytes(dumped(value, indent=2))
    )


def hostile_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """Content that was cut, flipped, repeated or written over in one to four places."""
    return _RANDOMS.map(partial(_changed_bytes, content))


def _changed_bytes(content: bytes, random: Random) -> bytes:
    result = content
    for _ in range(random.randint(1, 4)):
        start, end = sorted(random.randint(0, len(result)) for _ in range(2))
        kind = random.choice(("flip", "cut", "remove", "insert", "repeat", "replace"))
        if kind == "flip" and start < len(result):
            flipped = result[start] ^ (1 << random.randint(0, 7))
            result = result[:start] + bytes([flipped]) + result[start + 1 :]
        elif kind == "cut":
            result = result[:end]
        elif kind == "remove":
            result = result[:start] + result[end:]
        elif kind == "insert":
            result = result[:start] + random.choice(CHUNKS) + result[start:]
        elif kind == "repeat":
            result = result[:end] + result[start:end] + result[end:]
        elif kind == "replace":
            result = result[:start] + random.randbytes(random.randint(0, 40)) + result[end:]
    return result


def dumped(value: Any, **options: Any) -> bytes:
    """A value as JSON; where it says so, as one that is nested too deeply for a reader."""
    text = json.dumps(value, **options)
    return text.replace(json.dumps(DEEP), "[" * _DEPTH + "]" * _DEPTH).encode()


def ends_well(action: Callable[[], Any]) -> Any:
    """Fails unless an action ends soon, by itself or with an error that is one line for a person.

    Returns:
        What the action returned, or None after an error.
    """
    with _alarm(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return action()
        except (KalmaGroveError, OSError) as error:
            text = str(error)
            assert text.strip() and len(text.splitlines()) == 1, f"not one line: {text!r}"
            assert not ASKED_FOR_MEMORY.search(text), f"it asked for memory: {text[:300]}"
            return None


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Refuses memory that a small file has no right to ask for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Hung(BaseException):
    """An input that took far more time than any of its size may."""


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Hung(f"not done after {LONGEST_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    # The limit of the whole test is on the same timer.
    left, _ = signal.setitimer(signal.ITIMER_REAL, LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)
        signal.signal(signal.SIGALRM, before)


def _places(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield place
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*place, key))


def _with_change(value: Any, place: tuple[Any, ...], new: Any, kind: int) -> Any:
    """The value with something new in a place, which is left out where the kind is 0 and renamed where it is 1."""
    if not place:
        return copy.deepcopy(new) if kind > 7 else value
    parent = value
    try:
        for key in place[:-1]:
            parent = parent[key]
        if kind == 0:
            del parent[place[-1]]
        elif kind == 1 and isinstance(parent, dict):
            parent[str(new)[:50]] = parent.pop(place[-1])
        else:
            parent[place[-1]] = copy.deepcopy(new)
    except (KeyError, IndexError, TypeError):
        # An earlier change took the place away.
        pass
    return value
