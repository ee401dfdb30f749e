"""A run's metrics in TensorBoard or Trackio too, kept inside the run folder.

``metrics.jsonl`` is the record; a tracker is a copy of it for another tool. A run that goes on gives the tracker
everything again that the file still holds, so points after the checkpoint are neither lost there nor doubled.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from kalmagrove.errors import first_line
from kalmagrove.training.extras import require_extra
from kalmagrove.training.run_folder import RunFolder
from kalmagrove.training.tracking import MetricsWriter

_SECONDS_TO_END = 60.0


class Tracker(Protocol):
    """Takes a run's records; any error means that it is out of use."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes one record."""

    def close(self) -> None:
        """Returns when all that was taken is kept."""


class TrackedMetrics:
    """Writes records to ``metrics.jsonl``, and to a tracker for as long as that works.

    Args:
        writer: Of the file.
        name: Of the tracker, None for the file alone.
        folder: The run folder, whose records up to now a tracker is given first.
        warn: Told in one line that the tracker failed; the run goes on without it.
    """

    def __init__(
        self, writer: MetricsWriter, name: str | None, folder: RunFolder, *, warn: Callable[[str], None] | None = None
    ) -> None:
        self._writer, self._name, self._warn = writer, name, warn or _say
        self._tracker: Tracker | None = None
        if name is not None:
            self._try(lambda: self._open(_TRACKERS[name], folder))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; only what concerns the file can raise."""
        self._writer.write(record)
        if (tracker := self._tracker) is not None:
            self._try(lambda: tracker.write(record))

    def sync(self) -> None:
        """Waits until the file's records are on the disk."""
        self._writer.sync()

    def close(self) -> None:
        """Lets the tracker end; doing so twice is harmless."""
        if self._tracker is not None:
            self._try(self._tracker.close)
            self._tracker = None

    def _open(self, kind: Callable[[Path, Sequence[Mapping[str, Any]]], Tracker], folder: RunFolder) -> None:
        self._tracker = kind(folder.path, folder.read_metrics())

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # A copy of the metrics is not worth a run, whatever the other tool raises.
            tracker, self._tracker = self._tracker, None
            if tracker is not None:
                with suppress(Exception):
                    tracker.close()
            reason = first_line(error)
            self._warn(f"no more tracking with {self._name}: {reason}; metrics.jsonl goes on")


def check_tracker(name: str | None) -> None:
    """Whether a tracker can be used, before anything is written.

    Raises:
        UsageError: Its package is missing.
    """
    if name is not None:
        require_extra(name, extra=name, option=f"track {name}")


class TensorBoardTracker:
    """Event files in ``RUN/tensorboard``; their clock is seconds of training, without the pauses of a run that stopped.

    TensorBoard's own writers hand events to a thread, which prints a traceback when the disk is full; here a record is
    in the file when `write` returns, or `write` raises.

    Args:
        folder: The run folder.
        records: Earlier records of the run.
    """

    def __init__(self, folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        place = folder / "tensorboard"
        place.mkdir(exist_ok=True)
        for stale in place.glob("events.out.tfevents.*"):
            stale.unlink()
        now = time.time()
        self._file = (place / f"events.out.tfevents.{now:.0f}.{os.getpid()}").open("ab", buffering=0)
        self._records = RecordWriter(self._file)
        self._start = now - max((record.get("seconds", 0.0) for record in records), default=0.0)
        self._add(Event(wall_time=now, file_version="brain.Event:2"))
        # A TensorBoard that is open forgets the steps that it has read, and takes them again.
        self._add(Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START)))
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Each number under its own name."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers(record).items()]
        moment = self._start + record.get("seconds", 0.0)
        self._add(self._event(wall_time=moment, step=record["step"], summary=self._summary(value=values)))

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TrackioTracker:
    """A run in ``RUN/trackio``, or in the store that the variable TRACKIO_DIR names; nothing goes over the network.

    Trackio knows one store and one current run a process, so it works in a process of its own.

    Args:
        folder: The run folder.
        records: Earlier records of the run.
    """

    def __init__(self, folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
        folder = folder.resolve()
        shared = os.environ.get("TRACKIO_DIR")
        # In a shared store the folder tells this run from another of the same name.
        identity = str(folder) if shared else "this folder"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kalmagrove.training.trackio_process", folder.name, identity],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            # It would ask the Hub for the name of a user who is logged in there.
            env=environment | {"TRACKIO_DIR": shared or str(folder / "trackio"), "HF_HUB_OFFLINE": "1"},
        )
        for record in records:
            self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Hands the record over; the process keeps it half a second later."""
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(json.dumps({"step": record["step"], **numbers(record)}) + "\n")
            stream.flush()
        except BrokenPipeError:
            self.close()
            raise

    def close(self) -> None:
        """Waits until the store has everything.

        Raises:
            RuntimeError: The process reported an error, or ended with one.
        """
        try:
            said = (self._process.communicate(timeout=_SECONDS_TO_END)[0] or "").strip()
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise RuntimeError(f"its process did not end within {_SECONDS_TO_END:.0f} s") from None
        if said or self._process.returncode != 0:
            raise RuntimeError(said or f"its process ended with code {self._process.returncode}")


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn over the steps: the finite numbers of a record but its step."""
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


_TRACKERS: dict[str, Callable[[Path, Sequence[Mapping[str, Any]]], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "trackio": TrackioTracker,
}
