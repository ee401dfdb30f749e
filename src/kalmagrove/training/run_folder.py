"""Keep everything about one training run in one folder, which one process at a time may use."""

import json
import math
import os
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import read_json_object, remove, write_json_atomic, write_text_atomic
from kalmagrove.locks import LOCK_NAME, lock_folder, unlock

_ABSENT = "(absent)"
_SHOWN_DIFFERENCES = 3
_SHOWN_CHARACTERS = 60
_REMEDY = "delete it and run again"


@dataclass(frozen=True)
class RunFolder:
    """The files of one run; `open_run_folder` gives one for writing, `RunFolder(path)` one for reading.

    Used as a context manager it gives the folder free at the end.

    Attributes:
        path: The folder itself.
        lock: The open file that keeps other processes out, None for reading only.
    """

    path: Path
    lock: IO[bytes] | None = None

    @property
    def config_path(self) -> Path:
        """The resolved configuration, as YAML."""
        return self.path / "config.yaml"

    @property
    def environment_path(self) -> Path:
        """The machine and the package versions, as JSON."""
        return self.path / "environment.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON record a line, in the order of the steps."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        """The folder of the checkpoints, which the first of them creates."""
        return self.path / "checkpoints"

    @property
    def model_path(self) -> Path:
        """The folder of the finished model, which its export creates."""
        return self.path / "model"

    @property
    def result_path(self) -> Path:
        """The finished run's outcome, as JSON."""
        return self.path / "result.json"

    def read_config(self) -> dict[str, Any]:
        """Return the configuration as it was written, of a run or of a comparison.

        Raises:
            KalmaGroveError: The file is not YAML, or not a mapping.
            OSError: There is none, or it cannot be read.
        """
        import yaml

        # The library lets errors of its own through where a value does not have the form of its type.
        of_values = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)
        try:
            config = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, *of_values) as error:
            raise KalmaGroveError(f"{self.config_path} is not valid YAML; choose another run folder") from error
        if not isinstance(config, dict):
            raise KalmaGroveError(f"{self.config_path} does not hold a configuration; choose another run folder")
        return config

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Replace the configuration in one step, for what may grow."""
        write_text_atomic(self.config_path, _as_yaml(config))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the metrics records, without a last line that a crash cut.

        Raises:
            KalmaGroveError: A line before the last is not a JSON object.
        """
        return [record for _, record in self._metrics_lines()]

    def truncate_metrics(self, step: int) -> None:
        """Drop the records after a step, so that a run resumed there continues without repeats.

        A record without a `step` belongs to the one before it.

        Raises:
            KalmaGroveError: A line before the last is not a JSON object.
        """
        kept = []
        record_step = 0
        for line, record in self._metrics_lines():
            record_step = record.get("step", record_step)
            if record_step <= step:
                kept.append(line + "\n")
        if self.metrics_path.exists():
            write_text_atomic(self.metrics_path, "".join(kept))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Replace the run's outcome in one step; floats that are not finite become null."""
        write_json_atomic(self.result_path, result)

    def read_result(self) -> dict[str, Any] | None:
        """Return the run's outcome, or None while there is none.

        Raises:
            KalmaGroveError: The file is not a JSON object.
        """
        with suppress(FileNotFoundError):
            return read_json_object(self.result_path, _REMEDY)
        return None

    def read_environment(self) -> dict[str, Any]:
        """Return what is known of the machine and the code, nothing before the run began.

        Raises:
            KalmaGroveError: The file is not a JSON object.
        """
        with suppress(FileNotFoundError):
            return read_json_object(self.environment_path, _REMEDY)
        return {}

    def release(self) -> None:
        """Let other processes use the folder; doing so twice is harmless."""
        if self.lock is not None:
            unlock(self.lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _metrics_lines(self) -> list[tuple[str, dict[str, Any]]]:
        try:
            lines = self.metrics_path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        parsed = []
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode()
                record = json.loads(text)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except (ValueError, RecursionError) as error:
                if number == len(lines):
                    break
                raise KalmaGroveError(
                    f"{self.metrics_path} line {number} is not a JSON object; delete that line and run again"
                ) from error
            _check_record(record, f"{self.metrics_path} line {number}")
            parsed.append((text, record))
        return parsed


def valid_loss_of(result: Mapping[str, Any]) -> float:
    """Nats a token on the validation split, from a run's result; infinity for a run that diverged."""
    loss = (result.get("valid") or {}).get("loss")
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else math.inf


def open_run_folder(
    folder: Path,
    config: Mapping[str, Any],
    *,
    allow_changed: frozenset[str] = frozenset(),
    usual: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Create a run's folder, or open it again to continue with the same configuration.

    Nothing that is there is overwritten: a folder that is opened again keeps its configuration file.

    Args:
        folder: The run's folder; it may be missing or empty.
        config: The whole resolved configuration: nested mappings, sequences, paths and plain values.
        allow_changed: Dotted names of keys, or of groups of keys, that may differ from the folder's.
        usual: Values that keys have when nothing else is said: those of keys that the folder's configuration lacks,
            because it was written before they existed.

    Returns:
        The folder, locked against other processes until it is released.

    Raises:
        FolderInUse: Another process holds it.
        KalmaGroveError: The folder holds something else, or belongs to another configuration.
    """
    import yaml

    run = RunFolder(folder)
    _require_run_folder_or_empty(run)
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder, "Run folder")
    try:
        _remove_temporaries(folder)
        if run.config_path.exists():
            _require_same_config(run, yaml.safe_load(_as_yaml(config)), allow_changed, _plain(usual or {}))
        else:
            run.write_config(config)
    except BaseException:
        unlock(lock)
        raise
    return RunFolder(folder, lock)


def require_same_data(result: Mapping[str, Any], fingerprint: str, path: Path) -> None:
    """A text is known by its content: a result on another one is none of the run that is asked for.

    Raises:
        UsageError: The result is of other data.
    """
    if result.get("data_fingerprint", fingerprint) != fingerprint:
        raise UsageError(
            f"{path} was trained on other data; give the same data, choose another folder (--out) or delete this one"
        )


def _check_record(record: dict[str, Any], where: str) -> None:
    """What others rely on: steps are whole numbers, losses are numbers or null, and an evaluation has its step."""
    step = record.get("step", 0)
    wrong = None if isinstance(step, int) and not isinstance(step, bool) else "step"
    for name in ("loss", "valid_loss"):
        value = record.get(name)
        is_number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 53)
        if value is not None and (not is_number or isinstance(value, bool)):
            wrong = name
    if wrong is None and "valid_loss" in record and "step" not in record:
        wrong = "step"
    if wrong is not None:
        raise KalmaGroveError(f"{where} has no sound {wrong}; delete that line and run again")


def _require_run_folder_or_empty(run: RunFolder) -> None:
    if run.config_path.is_file():
        return
    if run.path.exists() and not run.path.is_dir():
        raise KalmaGroveError(f"{run.path} is a file; choose another run folder")
    # A crash before the first configuration was in place leaves only a lock or a temporary file.
    unfinished = (LOCK_NAME, f".{run.config_path.name}.tmp-")
    if run.path.is_dir() and any(not entry.name.startswith(unfinished) for entry in run.path.iterdir()):
        raise KalmaGroveError(
            f"{run.path} is not empty and is not a run folder (it has no config.yaml); choose another folder"
        )


def _remove_temporaries(folder: Path) -> None:
    for path in folder.glob(".*.tmp-*"):
        remove(path)


def _require_same_config(
    run: RunFolder, config: Mapping[str, Any], allow_changed: frozenset[str], usual: Mapping[str, Any]
) -> None:
    stored = _with_usual(run.read_config(), usual)
    differences = [
        f"{_shorten(name)}: {_shorten(old)} -> {_shorten(new)}"
        for name, old, new in _differences(stored, config, "")
        if not any(name == allowed or name.startswith(f"{allowed}.") for allowed in allow_changed)
    ]
    if differences:
        more = len(differences) - _SHOWN_DIFFERENCES
        shown = ", ".join(differences[:_SHOWN_DIFFERENCES]) + (f" and {more} more" if more > 0 else "")
        raise UsageError(
            f"Run folder {run.path} belongs to another configuration ({shown}); "
            "choose another folder or delete this one"
        )


def _with_usual(stored: dict[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the usual values of single keys that it lacks; a whole group is not made up."""
    filled = dict(stored)
    for key, value in usual.items():
        if isinstance(value, dict):
            if isinstance(stored.get(key), dict):
                filled[key] = _with_usual(stored[key], value)
        else:
            filled.setdefault(key, value)
    return filled


def _as_yaml(config: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Return a configuration value made only of what YAML's safe form can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def _differences(old: Any, new: Any, name: str) -> list[tuple[str, Any, Any]]:
    """Return (dotted name, old value, new value) for each leaf that differs, in the new one's order."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        prefix = f"{name}." if name else ""
        pairs = [(f"{prefix}{key}", old.get(key, _ABSENT), new.get(key, _ABSENT)) for key in keys]
        return [difference for child, before, after in pairs for difference in _differences(before, after, child)]
    both_nan = old != old and new != new
    return [] if old == new or both_nan else [(name, old, new)]


def _shorten(value: Any) -> str:
    # An alias can make a small file a huge value, so what is nested is not written out.
    text = " ".join((reprlib.repr(value) if isinstance(value, dict | list) else str(value)).split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
