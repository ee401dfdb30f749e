"""What a run folder tells about its run while another process trains: only read, never written."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from kalmagrove.errors import KalmaGroveError
from kalmagrove.locks import LOCK_NAME, is_locked
from kalmagrove.training.checkpoint import checkpoint_path, named_steps
from kalmagrove.training.run_folder import RunFolder

Status = Literal["running", "stopped", "finished", "diverged"]
SWEEP_FACTS = "sweep.json"
ENDED: frozenset[Status] = frozenset({"finished", "diverged"})
_WINDOW = 50
_LOSSES = ("loss", "valid_loss")
_AMOUNTS = ("tokens", "seconds", "lr", "grad_norm", "tokens_per_second", "step_seconds", "peak_memory_bytes")
_TOO_LARGE = 1 << 53


@dataclass(frozen=True)
class RunState:
    """A run at one moment; what is not known yet, or is no number that it could be, is None.

    Attributes:
        name: The folder, or its part below a comparison's folder.
        status: running while a process holds the folder, stopped when none does before the end.
        step: Steps that are done.
        total_steps: Steps of the whole run.
        loss: Of the last record, in nats a token.
        valid_loss: Of the last evaluation.
        lr: Learning rate of the last record.
        grad_norm: Norm of its gradient before clipping.
        tokens_per_second: Of the last records together.
        seconds: Time of the training steps up to now.
        seconds_left: Time of those that remain, at the speed of the last records.
        peak_memory_bytes: As the last record has it.
        checkpoint_step: Step of the newest checkpoint.
        checkpoint_age: Seconds since it was written.
        record_age: Seconds since the last record.
        test_perplexity: Of a finished run.
        losses: (step, loss) of every record.
        valid_losses: (step, loss) of every evaluation.
    """

    name: str
    status: Status
    step: int
    total_steps: int
    loss: float | None = None
    valid_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    seconds_left: float | None = None
    peak_memory_bytes: int | None = None
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    record_age: float | None = None
    test_perplexity: float | None = None
    losses: tuple[tuple[int, float], ...] = ()
    valid_losses: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the curves."""
        return {name: value for name, value in asdict(self).items() if name not in ("losses", "valid_losses")}


class MetricsTail:
    """The records of a growing file, reading only what is new.

    Lines that are no records are passed over, and a number of a record that cannot be one is None. A last line that is
    not whole is left for the next time; a file that was cut or replaced, as resuming does, is read from its beginning.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = []
        self._forget()

    def _forget(self) -> None:
        self._offset, self._last_line = 0, b""
        self.records = []

    def update(self) -> None:
        """Takes in what was written since the last call.

        Raises:
            KalmaGroveError: The file is a pipe, a folder or a device.
        """
        _require_regular(self._path)
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset - len(self._last_line))
                if file.read(len(self._last_line)) != self._last_line:
                    self._forget()
                    file.seek(0)
                new = file.read()
        except FileNotFoundError:
            self._forget()
            return
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines(keepends=True):
            self._offset, self._last_line = self._offset + len(line), line
            if (record := _record(line)) is not None:
                self.records.append(record)


class RunWatch:
    """Reads one run folder again and again.

    Args:
        folder: Of a run; it has its configuration by now.
        name: How the run is called.
        within_comparison: Whether the run is done with its last step: a comparison evaluates some runs, not all.
        clock: Seconds since 1970, as files have them.

    Raises:
        KalmaGroveError: The configuration cannot be read.
    """

    def __init__(
        self, folder: Path, name: str, *, within_comparison: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder = RunFolder(folder)
        self._name, self._within_comparison, self._clock = name, within_comparison, clock
        self._total_steps = _total_steps(_read_config(folder), self.folder.config_path)
        self._tail = MetricsTail(self.folder.metrics_path)

    def read(self) -> RunState:
        """The run as its files are now.

        Raises:
            KalmaGroveError: The result is not JSON, or a file is a pipe, a folder or a device.
        """
        self._tail.update()
        _require_regular(self.folder.result_path)
        result = self.folder.read_result()
        trained = [r for r in self._tail.records if "loss" in r]
        evaluated = [r for r in self._tail.records if r.get("valid_loss") is not None]
        last: Mapping[str, Any] = trained[-1] if trained else {}
        step = last.get("step", 0)
        speed, step_seconds = _speed(trained[-_WINDOW:])
        checkpoint_step, checkpoint_time = self._newest_checkpoint()
        return RunState(
            name=self._name,
            status=self._status(result, step),
            step=step,
            total_steps=self._total_steps,
            loss=last.get("loss"),
            valid_loss=evaluated[-1]["valid_loss"] if evaluated else None,
            lr=last.get("lr"),
            grad_norm=last.get("grad_norm"),
            tokens_per_second=speed,
            seconds=last.get("seconds"),
            seconds_left=None if step_seconds is None else _amount(step_seconds * max(0, self._total_steps - step)),
            peak_memory_bytes=last.get("peak_memory_bytes"),
            checkpoint_step=checkpoint_step,
            checkpoint_age=self._age(checkpoint_time),
            record_age=self._age(_modified(self.folder.metrics_path)) if trained else None,
            test_perplexity=_test_perplexity(result or {}),
            losses=tuple((r["step"], r["loss"]) for r in trained if r["loss"] is not None),
            valid_losses=tuple((r["step"], r["valid_loss"]) for r in evaluated),
        )

    def _status(self, result: Mapping[str, Any] | None, step: int) -> Status:
        if result is not None:
            return "diverged" if result.get("diverged") else "finished"
        if is_in_use(self.folder.path):
            return "running"
        if self._tail.records and "diverged" in self._tail.records[-1]:
            return "diverged"
        return "finished" if self._within_comparison and step >= self._total_steps else "stopped"

    def _newest_checkpoint(self) -> tuple[int | None, float | None]:
        """Step and time of the newest checkpoint."""
        try:
            steps = [step for step in named_steps(self.folder.checkpoints_path) if step < _TOO_LARGE]
        except OSError:
            return None, None
        return (
            (steps[-1], _modified(checkpoint_path(self.folder.checkpoints_path, steps[-1]))) if steps else (None, None)
        )

    def _age(self, moment: float | None) -> float | None:
        return None if moment is None else max(0.0, self._clock() - moment)


class FolderWatch:
    """Reads a run, or all runs of a comparison or of a sweep that have begun.

    Args:
        folder: What ``--out`` named.

    Raises:
        KalmaGroveError: It is not there yet, or is something else.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        if not folder.exists():
            raise KalmaGroveError(f"{folder} does not exist; give the folder that --out of train or compare names")
        if not (folder / "config.yaml").is_file():
            raise KalmaGroveError(f"{folder} is not a run folder (it has no config.yaml)")
        self.folder, self._clock = folder, clock
        config = _read_config(folder)
        self.is_comparison, self._is_sweep = "models" in config, "families" in config
        self._runs: dict[Path, RunWatch] = {}

    def read(self) -> list[RunState]:
        """The runs in the order in which they began.

        Raises:
            KalmaGroveError: The files of one cannot be read.
        """
        places: Iterable[Path] = [self.folder / "config.yaml"]
        if self.has_many:
            places = self.folder.glob("runs/**/seed-*/config.yaml" if self._is_sweep else "*/*/*/config.yaml")
        for path in sorted({config.parent for config in places} - set(self._runs), key=_created):
            name = path.relative_to(self.folder).as_posix() if self.has_many else str(path)
            self._runs[path] = RunWatch(path, _printable(name), within_comparison=self.is_comparison, clock=self._clock)
        return [run.read() for run in self._runs.values()]

    @property
    def has_many(self) -> bool:
        """Whether the folder is of more than one run."""
        return self.is_comparison or self._is_sweep

    def has_ended(self, states: list[RunState]) -> bool:
        """Whether nothing more will come: not where a run has stopped, since it may go on."""
        if self._is_sweep:
            # Its facts are the last thing that a sweep writes, of the ladder that there was.
            facts = _plan(self.folder / SWEEP_FACTS)
            is_whole = bool(facts) and facts.get("config") == _read_config(self.folder)
            return is_whole and all(state.status in ENDED for state in states)
        if not self.is_comparison:
            return all(state.status in ENDED for state in states)
        # Memory is the last thing that a comparison measures.
        return "memory" in _plan(self.folder / "plan.json") and not is_in_use(self.folder)


def is_in_use(folder: Path) -> bool:
    """Whether a process holds a run folder; False where the system has no locks."""
    try:
        _require_regular(folder / LOCK_NAME)
        with (folder / LOCK_NAME).open("rb") as file:
            return is_locked(file)
    except (KalmaGroveError, OSError):
        return False


def _read_config(folder: Path) -> dict[str, Any]:
    run = RunFolder(folder)
    _require_regular(run.config_path)
    return run.read_config()


def _require_regular(path: Path) -> None:
    """Refuses what is there and is no file: to read a pipe is to wait for its writer."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise KalmaGroveError(f"{path} is not a regular file; remove it, or choose another run folder")


def _total_steps(config: Mapping[str, Any], path: Path) -> int:
    try:
        loop = config["loop"]
        steps = int(loop["tokens"]) // (int(loop["batch_size"]) * int(loop["context_length"]))
        if not 0 <= steps < _TOO_LARGE:
            raise ValueError("no number of steps that a run could have")
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise KalmaGroveError(f"{path} does not say how long the run is (loop.tokens)") from error
    return steps


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or _amount(record["step"]) is None:
        return None
    sound = {name: _number(record[name]) for name in _LOSSES if name in record}
    return record | sound | {name: _amount(record[name]) for name in _AMOUNTS if name in record}


def _number(value: Any) -> Any:
    """The value where it is a number of a size that can be calculated with, None where not."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < _TOO_LARGE else None


def _amount(value: Any) -> Any:
    """The value where it is a number that is not negative, None where not."""
    number = _number(value)
    return number if number is not None and number >= 0 else None


def _test_perplexity(result: Mapping[str, Any]) -> float | None:
    test = result.get("test")
    perplexity: float | None = _amount(test.get("perplexity")) if isinstance(test, dict) else None
    return perplexity


def _speed(records: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Tokens a second, and seconds a step, between the first of the records and the last."""
    if not records:
        return None, None
    timed = [r for r in records if r.get("tokens") is not None and r.get("seconds") is not None]
    if timed:
        steps, tokens, seconds = (timed[-1][key] - timed[0][key] for key in ("step", "tokens", "seconds"))
        if steps > 0 and seconds > 0:
            return _amount(tokens / seconds), _amount(seconds / steps)
    return records[-1].get("tokens_per_second"), records[-1].get("step_seconds")


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _created(folder: Path) -> tuple[float, str]:
    return _modified(folder / "config.yaml") or 0.0, folder.as_posix()


def _printable(name: str) -> str:
    """A name in which what a terminal would not show as a character is written out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)


def _plan(path: Path) -> dict[str, Any]:
    _require_regular(path)
    try:
        plan = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) else {}
