"""What a request asks for, from its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kalmagrove.evaluation.generation import Sampling
from kalmagrove.serving.errors import RequestError
from kalmagrove.serving.fields import check_names, flag, number, stop_strings, whole_number, wrong

_COMMON = {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "stream_options"}
TOKENS_OF_A_COMPLETION = 16
"""Where a completion does not say how many, as in OpenAI's API."""
ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True)
class Wanted:
    """What both kinds of requests ask for.

    Attributes:
        model: The name that was given, or None.
        sampling: How tokens are chosen.
        stream: Whether the answer comes in pieces.
        include_usage: Whether the last piece counts tokens.
    """

    model: str | None
    sampling: Sampling
    stream: bool
    include_usage: bool


def parse_json(content: bytes) -> dict[str, Any]:
    """A request's body.

    Raises:
        RequestError: It is no JSON object.
    """
    try:
        body = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "the body is not JSON in UTF-8", code="invalid_json") from error
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object", code="invalid_json")
    return body


def completion_of(
    body: Mapping[str, Any], *, most_tokens: int, next_seed: Callable[[], int]
) -> tuple[Wanted, str | list[int]]:
    """What is asked of /v1/completions, and the prompt: a text or tokens.

    Args:
        body: The request.
        most_tokens: Of any answer.
        next_seed: Called where the request has none.

    Raises:
        RequestError: A field is wrong.
    """
    check_names(body, _COMMON | {"prompt"})
    tokens = whole_number(body, "max_tokens", TOKENS_OF_A_COMPLETION, 1, 1 << 40)
    prompt = _prompt(body.get("prompt"))
    return _wanted(body, min(tokens, most_tokens), next_seed), prompt


def chat_of(
    body: Mapping[str, Any], *, most_tokens: int, next_seed: Callable[[], int]
) -> tuple[Wanted, list[dict[str, str]]]:
    """What is asked of /v1/chat/completions, and the messages: role and content of each.

    Args:
        body: The request.
        most_tokens: Of any answer.
        next_seed: Called where the request has none.

    Raises:
        RequestError: A field is wrong.
    """
    check_names(body, _COMMON | {"messages", "max_completion_tokens"})
    tokens = whole_number(body, "max_tokens", most_tokens, 1, 1 << 40)
    tokens = whole_number(body, "max_completion_tokens", tokens, 1, 1 << 40)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "a list of at least one message", messages)
    checked = [_message(message) for message in messages]
    return _wanted(body, min(tokens, most_tokens), next_seed), checked


def _wanted(body: Mapping[str, Any], tokens: int, next_seed: Callable[[], int]) -> Wanted:
    model, options = body.get("model"), body.get("stream_options")
    if model is not None and not isinstance(model, str):
        raise wrong("model", "a text", model)
    if options is not None and (not isinstance(options, dict) or not flag(body, "stream")):
        raise wrong("stream_options", "an object beside stream: true", options)
    top_p = number(body, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise wrong("top_p", "above 0", body.get("top_p"))
    stream, with_usage = flag(body, "stream"), flag(options or {}, "include_usage")
    sampling = Sampling(
        max_new_tokens=tokens,
        temperature=number(body, "temperature", 1.0, 0.0, 2.0),
        top_k=whole_number(body, "top_k", 0, 0, 1 << 40),
        top_p=top_p,
        stop=stop_strings(body),
    )
    # Only a request that is right takes one.
    seed = next_seed() if body.get("seed") is None else whole_number(body, "seed", 0, 0, 2**63 - 1)
    return Wanted(model, replace(sampling, seed=seed), stream, with_usage)


def _prompt(prompt: Any) -> str | list[int]:
    """One text or one list of tokens, alone or as the one item of a list."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    if isinstance(prompt, list) and len(prompt) > 1 and all(isinstance(part, str | list) for part in prompt):
        raise RequestError(400, "a request has one prompt here; send one request for each", param="prompt")
    raise wrong("prompt", "a text or a list of tokens", prompt)


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(
            400, f"each message must be an object with a role, one of {', '.join(ROLES)}", param="messages"
        )
    parts = message.get("content")
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    if not isinstance(parts, list) or not all(_is_text_part(part) for part in parts):
        raise RequestError(
            400, "the content of a message must be a text, or a list of parts of the type text", param="messages"
        )
    return {"role": message["role"], "content": "".join(part["text"] for part in parts)}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
