"""A request that cannot be answered, and what its sender is told in OpenAI's form."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """Ends a request.

    Args:
        status: Of HTTP.
        message: For a person.
        param: The field that is wrong.
        code: For a program.
        retry_after: Seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def to_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
