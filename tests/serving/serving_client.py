"""A server process and a client of it."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 120
GREEDY = {"prompt": "The river", "temperature": 0}


@dataclass
class Server:
    """A server process.

    Attributes:
        process: It.
        port: Where it listens.
        lines: Of its output.
    """

    process: subprocess.Popen[str]
    port: int
    lines: list[str] = field(default_factory=list)

    @classmethod
    @contextmanager
    def started(cls, folder: Path, *flags: str) -> Iterator[Server]:
        """A server that has begun to listen, and is killed at the end."""
        command = [sys.executable, "-W", "error", "-m", "kalmagrove", "serve", str(folder), "--port", "0", *flags]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                first = process.stderr.readline()
                found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1; Ctrl-C stops it", first)
                assert found is not None, first + process.stderr.read()
                server = cls(process, int(found[1]), [first])
                reader = threading.Thread(target=server._read)
                reader.start()
                yield server
            finally:
                process.kill()
            reader.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def wait_for(self, text: str, count: int = 1) -> str:
        """The count-th line of the output with a text."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            found = [line for line in list(self.lines) if text in line]
            if len(found) >= count:
                return found[count - 1]
            time.sleep(0.02)
        raise AssertionError(f"{text!r} is not in {self.lines}")

    def send(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """An answer whose body is not read yet."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if headers is None else headers
        # With it the response owns the socket, which is closed when the response is.
        given = given | {"Connection": "close"}
        connection.request(method or ("GET" if body is None else "POST"), path, content, given)
        return connection.getresponse()

    def ask(self, path: str, body: Any = None, **options: Any) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer."""
        with self.send(path, body, **options) as response:
            return response.status, json.loads(response.read())

    def complete(self, **options: Any) -> str:
        """The text of a completion."""
        status, answer = self.ask("/v1/completions", GREEDY | options)
        assert status == 200, answer
        return str(answer["choices"][0]["text"])

    def begin(self, **options: Any) -> http.client.HTTPResponse:
        """A stream that has given its first event."""
        response = self.send("/v1/completions", GREEDY | {"stream": True} | options)
        assert response.status == 200, response.read()
        assert response.readline().startswith(b"data: {")
        return response


def events_of(response: http.client.HTTPResponse) -> list[Any]:
    """What is left of a stream; its end mark is the text [DONE]."""
    with response:
        lines = response.read().decode().split("\n\n")
    parts = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


def hang_up(response: http.client.HTTPResponse) -> None:
    """Ends the connection in the middle of an answer."""
    response.close()
