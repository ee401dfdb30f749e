"""Runs `kalmagrove` commands in forked children, so that a killed one costs no second import of torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class FaultServer:
    """One process that has imported the package, and forks a child for each command.

    Args:
        output: Receives what the children print.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(output)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )

    def start(self, words: Sequence[str]) -> None:
        """Lets a child run a command line; only one child at a time."""
        assert self._ask("start", list(words)) == "started"

    def kill(self) -> int:
        """Kills the child; returns its exit code, -9 unless it had ended before."""
        return int(self._ask("kill"))

    def wait(self) -> int:
        """Lets the child end; returns its exit code."""
        return int(self._ask("wait"))

    def ended(self) -> bool:
        """Whether the child has ended by itself."""
        return bool(self._ask("ended"))

    def run(self, words: Sequence[str]) -> int:
        """Lets a child run a command line to its end; returns its exit code."""
        self.start(words)
        return self.wait()

    def printed(self) -> str:
        """What the last child printed, to say in a failure."""
        return self.output.read_text(errors="replace")

    def _ask(self, what: str, words: Sequence[str] = ()) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([what, *words]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()


def _run_command(words: Sequence[str], output: str) -> None:
    """The child: the command with its own output, and no way back into the server."""
    code = 70
    try:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), target, target)):
            os.dup2(descriptor, number)
        from kalmagrove.cli import main

        code = main(words)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(output: str) -> None:
    import torch

    import kalmagrove.commands.train
    import kalmagrove.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    child, status = 0, None
    for line in iter(sys.stdin.readline, ""):
        what, *words = json.loads(line)
        answer: Any = "started"
        if what == "start":
            status = None
            child = os.fork()
            if child == 0:
                _run_command(words, output)
        else:
            if what == "kill" and status is None:
                # Until it is waited for, even a child that has ended keeps its number.
                os.kill(child, signal.SIGKILL)
            if status is None:
                found, ending = os.waitpid(child, os.WNOHANG if what == "ended" else 0)
                status = os.waitstatus_to_exitcode(ending) if found else None
            answer = status is not None if what == "ended" else status
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
