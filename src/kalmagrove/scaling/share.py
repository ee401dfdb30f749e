"""How workers divide a ladder's runs between them: by the locks of run folders, or by an Optuna study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kalmagrove.scaling.ladder import Rung
from kalmagrove.training.run_folder import RunFolder, require_same_data
from kalmagrove.training.watching import is_in_use

Result = Mapping[str, Any]


class Claim(Protocol):
    """A run that this worker may train."""

    @property
    def rung(self) -> Rung:
        """Which."""

    def held(self) -> AbstractContextManager[object]:
        """While it is open, others know that the run is being trained."""

    def finish(self, result: Result) -> None:
        """Tells all workers the outcome."""

    def give_back(self) -> None:
        """Lets another worker have the run."""


class Share(Protocol):
    """What all workers of a ladder know."""

    def results(self, runs: Iterable[Rung]) -> dict[str, Result]:
        """The outcomes of finished runs by their keys."""

    def take(self, runs: Sequence[Rung]) -> Claim | None:
        """One of the runs that nobody trains, the first if possible; None while all are taken."""


def run_path(folder: Path, rung: Rung) -> Path:
    """Where a run of a sweep lives."""
    return folder / "runs" / rung.key


@dataclass(frozen=True)
class FolderShare:
    """Workers that see one folder: a run is taken while its run folder is locked.

    Attributes:
        folder: Of the sweep.
        data_fingerprint: Of the text that its runs are trained on.
    """

    folder: Path
    data_fingerprint: str

    def results(self, runs: Iterable[Rung]) -> dict[str, Result]:
        """The ``result.json`` of each run that has one.

        Raises:
            UsageError: One is of another text.
            KalmaGroveError: One is not JSON.
        """
        found = {rung.key: RunFolder(run_path(self.folder, rung)).read_result() for rung in runs}
        known: dict[str, Result] = {key: result for key, result in found.items() if result is not None}
        for key, result in known.items():
            require_same_data(result, self.data_fingerprint, self.folder / "runs" / key)
        return known

    def take(self, runs: Sequence[Rung]) -> Claim | None:
        """The first run whose folder nobody holds; another worker may still be faster to lock it."""
        free = (rung for rung in runs if not is_in_use(run_path(self.folder, rung)))
        rung = next(free, None)
        return None if rung is None else FolderClaim(rung)


@dataclass(frozen=True)
class FolderClaim:
    """A run whose lock and ``result.json`` say everything.

    Attributes:
        rung: Which.
    """

    rung: Rung

    def held(self) -> AbstractContextManager[object]:
        """Nothing: the training holds the lock."""
        return nullcontext()

    def finish(self, result: Result) -> None:
        """Nothing: the result is in the run's folder."""

    def give_back(self) -> None:
        """Nothing: the lock is free when the training ends."""
