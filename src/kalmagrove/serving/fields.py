"""The fields of a request, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kalmagrove.serving.errors import RequestError
from kalmagrove.serving.options import MOST_STOPS

WITHOUT_MEANING = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields of OpenAI's API that change nothing here."""
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
"""Fields that are known and not offered, with the values that ask for nothing."""


def check_names(body: Mapping[str, Any], known: set[str]) -> None:
    """That a request asks for nothing that it would not get.

    Raises:
        RequestError: A field is unknown, or asks for what is not offered.
    """
    for name, value in body.items():
        if name in known or name in WITHOUT_MEANING or value is None:
            continue
        if name not in NOT_HERE:
            raise RequestError(400, f"unknown field {name[:60]!r}", code="unknown_parameter")
        if not any(_kind(value) is _kind(plain) and value == plain for plain in NOT_HERE[name]):
            raise RequestError(
                400, f"this server does not offer {name}; leave it out", param=name, code="unsupported_parameter"
            )


def _kind(value: Any) -> type:
    """0 and 0.0 are one number in JSON; false is none."""
    return float if type(value) is int else type(value)


def number(body: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    """A number between two limits, or the default where the field is missing or null.

    Raises:
        RequestError: It is something else.
    """
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(name, f"a number from {least} to {most}", value)
    if not least <= value <= most:
        raise wrong(name, f"from {least} to {most}", value)
    return float(value)


def whole_number(body: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    """A whole number between two limits, or the default where the field is missing or null.

    Raises:
        RequestError: It is something else.
    """
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise wrong(name, f"a whole number from {least} to {most}", value)
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    """True or false; false where the field is missing or null.

    Raises:
        RequestError: It is something else.
    """
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return bool(value)


def stop_strings(body: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that end an answer.

    Raises:
        RequestError: They are something else, or too many.
    """
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise wrong("stop", f"a text that is not empty, or at most {MOST_STOPS} of them", value)
    return tuple(stops)


def wrong(name: str, expected: str, value: Any) -> RequestError:
    """The error of a field that is not what it must be."""
    return RequestError(400, f"{name} must be {expected}, got {_shown(value)}", param=name, code="invalid_value")


def _shown(value: Any) -> str:
    text = "true" if value is True else "false" if value is False else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
