"""Answers in the form of OpenAI's API, whole and in pieces."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any


def usage(prompt: int, generated: int) -> dict[str, int]:
    """The tokens of an answer."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def event(value: Any) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(value)}\n\n".encode()


END_OF_STREAM = b"data: [DONE]\n\n"


class CompletionForm:
    """Of /v1/completions.

    Args:
        model: The name that is answered with.
    """

    prefix, whole_kind, piece_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str) -> None:
        self._common = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: str, counts: dict[str, int]) -> dict[str, Any]:
        """The answer at once."""
        return {**self._common, "object": self.whole_kind, "choices": [self._choice(text, finish)], "usage": counts}

    def piece(self, text: str, finish: str | None) -> dict[str, Any]:
        """A part of the answer; the last one says why it ends."""
        return {**self._common, "object": self.piece_kind, "choices": [self._part(text, finish)]}

    def opening(self) -> list[dict[str, Any]]:
        """What comes before the first part."""
        return []

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """What comes after the last part where it was asked for."""
        return {**self._common, "object": self.piece_kind, "choices": [], "usage": counts}

    def _choice(self, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}

    def _part(self, text: str, finish: str | None) -> dict[str, Any]:
        return self._choice(text, finish)


class ChatForm(CompletionForm):
    """Of /v1/chat/completions."""

    prefix, whole_kind, piece_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": None}
        return [{**self._common, "object": self.piece_kind, "choices": [choice]}]

    def _choice(self, text: str, finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text}
        return {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}

    def _part(self, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish, "logprobs": None}
