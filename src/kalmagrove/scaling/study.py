"""A ladder shared by machines without a common folder: an Optuna study on a journal file or an SQL database."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from kalmagrove.errors import KalmaGroveError, first_line
from kalmagrove.scaling.ladder import GROWING_OPTIONS, Rung, SweepConfig
from kalmagrove.scaling.share import Claim, Result
from kalmagrove.training.config import NEUTRAL_OPTIONS, plain_options

if TYPE_CHECKING:
    import optuna

SECONDS_BETWEEN_SIGNS = 20.0
SECONDS_UNTIL_LOST = 180.0
"""A worker that gave no sign of life for so long has lost its run to the others."""
_KEY, _ALIVE, _RESULT = "run", "alive", "result"


def open_study(storage: str, config: SweepConfig, data_fingerprint: str) -> StudyShare:
    """The study of a ladder, made where it is missing.

    Args:
        storage: A journal file, or the URL of an SQL database such as ``postgresql://host/name``.
        config: The ladder; another one has another study in the same storage.
        data_fingerprint: Of its packed text.

    Raises:
        KalmaGroveError: Optuna is not installed, or the storage cannot be opened.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise KalmaGroveError("--storage needs Optuna: pip install 'kalmagrove[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        opened: Any = (
            optuna.storages.RDBStorage(storage)
            if "://" in storage
            else optuna.storages.JournalStorage(JournalFileBackend(storage))
        )
        study = optuna.create_study(
            storage=opened, study_name=f"kalmagrove-{_identity(config, data_fingerprint)}", load_if_exists=True
        )
    # Drivers of databases raise many unrelated kinds of errors.
    except Exception as error:
        reason = first_line(error)
        raise KalmaGroveError(f"the storage {storage} cannot be opened: {reason}") from error
    return StudyShare(study)


def _identity(config: SweepConfig, data_fingerprint: str) -> str:
    options = plain_options(config)
    for name in GROWING_OPTIONS:
        options.pop(name, None)
    for name in NEUTRAL_OPTIONS:
        section, _, key = name.partition(".")
        if isinstance(options.get(section), dict):
            options[section].pop(key, None)
    # The same text may lie elsewhere on another machine.
    options["data"] = data_fingerprint
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


class StudyShare:
    """Workers that see one study: each trial is a run, and carries its outcome.

    Args:
        study: The study.
    """

    def __init__(self, study: optuna.Study) -> None:
        self.study = study

    def results(self, runs: Iterable[Rung]) -> dict[str, Result]:
        """The outcomes of the runs' trials that are complete."""
        import optuna

        wanted = {rung.key for rung in runs}
        complete = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        return {
            trial.user_attrs[_KEY]: json.loads(trial.user_attrs[_RESULT])
            for trial in complete
            if trial.user_attrs.get(_KEY) in wanted and _RESULT in trial.user_attrs
        }

    def take(self, runs: Sequence[Rung]) -> Claim | None:
        """The run of the oldest trial that waits, after those without a trial got one."""
        import optuna

        self._fail_lost_trials()
        known = {trial.user_attrs.get(_KEY) for trial in self._alive_trials()}
        for rung in runs:
            if rung.key not in known:
                self.study.enqueue_trial({}, user_attrs={_KEY: rung.key})
        by_key = {rung.key: rung for rung in runs}
        waiting = optuna.trial.TrialState.WAITING
        while self.study.get_trials(deepcopy=False, states=(waiting,)):
            trial = self.study.ask()
            trial.set_user_attr(_ALIVE, time.time())
            wanted = by_key.get(trial.user_attrs.get(_KEY, ""))
            # Two workers may have enqueued the same run, or both have seen the last that waited.
            if wanted is not None and not self._has_older_trial(wanted, trial.number):
                return StudyClaim(wanted, self.study, trial)
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return None

    def _alive_trials(self) -> list[optuna.trial.FrozenTrial]:
        import optuna

        state = optuna.trial.TrialState
        return self.study.get_trials(deepcopy=False, states=(state.WAITING, state.RUNNING, state.COMPLETE))

    def _has_older_trial(self, rung: Rung, number: int) -> bool:
        return any(t.user_attrs.get(_KEY) == rung.key and t.number < number for t in self._alive_trials())

    def _fail_lost_trials(self) -> None:
        import optuna

        now = time.time()
        for trial in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            sign = trial.user_attrs.get(_ALIVE) or (trial.datetime_start.timestamp() if trial.datetime_start else now)
            if now - sign > SECONDS_UNTIL_LOST:
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)


class StudyClaim:
    """A run by its trial.

    Args:
        rung: Which.
        study: The study.
        trial: The trial, which is running.
    """

    def __init__(self, rung: Rung, study: optuna.Study, trial: optuna.Trial) -> None:
        self.rung, self._study, self._trial = rung, study, trial

    @contextmanager
    def held(self) -> Iterator[None]:
        """Gives a sign of life now and then."""
        ended = threading.Event()

        def give_signs() -> None:
            while not ended.wait(SECONDS_BETWEEN_SIGNS):
                # A sign that the database refuses is made up for by the next one.
                with suppress(Exception):
                    self._trial.set_user_attr(_ALIVE, time.time())

        thread = threading.Thread(target=give_signs, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def finish(self, result: Result) -> None:
        """The outcome goes with the trial, so that every machine has it."""
        import optuna

        valid = result.get("valid") or {}
        state = optuna.trial.TrialState
        loss = valid.get("loss")
        # Somebody else has the run where this machine gave no sign of life for too long: theirs counts.
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._trial.set_user_attr(_RESULT, json.dumps(result))
            # A run that diverged has no value, but is done.
            self._study.tell(self._trial, values=float("inf") if loss is None else loss, state=state.COMPLETE)

    def give_back(self) -> None:
        """The trial has failed, and the run gets a new one."""
        import optuna

        self._study.tell(self._trial, state=optuna.trial.TrialState.FAIL, skip_if_finished=True)
