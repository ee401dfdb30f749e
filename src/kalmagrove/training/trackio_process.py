"""The process in which Trackio works: one run in one store, its records as lines of JSON on stdin.

The first thing that goes wrong is written to stdout, in a line; silence is success.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import warnings
from typing import Any, TextIO

PROJECT = "kalmagrove"


def main(name: str, identity: str) -> None:
    """Keeps the lines of stdin until it ends.

    Args:
        name: Of the run.
        identity: Tells whether an earlier run of this name is the same one, which this one replaces.
    """
    # The training process ends this one by closing its stdin, after a Ctrl-C too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answer = _FirstLine(sys.stdout)
    sys.stdout = io.StringIO()  # Trackio prints what it does.
    warnings.showwarning = lambda message, *_: answer.say(str(message))
    try:
        _follow(sys.stdin, name, identity)
    except Exception as error:
        answer.say(f"{type(error).__name__}: {error}")
        sys.exit(1)


def _follow(lines: TextIO, name: str, identity: str) -> None:
    import trackio

    _remove_earlier(trackio, name, identity)
    run = trackio.init(
        project=PROJECT,
        name=name,
        config={"folder": identity},
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    for line in lines:
        record = json.loads(line)
        run.log(record, step=record.pop("step"))
    run.finish()


def _remove_earlier(trackio: Any, name: str, identity: str) -> None:
    api = trackio.Api()
    try:
        runs = list(api.runs(PROJECT))
    except ValueError:  # The store is new.
        return
    for run in runs:
        if run.name == name and (run.config or {}).get("folder") == identity:
            run.delete()


class _FirstLine:
    def __init__(self, stream: TextIO) -> None:
        self._stream, self._said = stream, False

    def say(self, text: str) -> None:
        if not self._said:
            self._said = True
            print(" ".join(text.split()), file=self._stream, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
