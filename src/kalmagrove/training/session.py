"""A training run and its folder together: goes on from the last checkpoint, writes metrics, saves, finishes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kalmagrove.data.training_data import TrainingData
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import write_json_atomic
from kalmagrove.training.checkpoint import (
    checkpoint_path,
    latest_checkpoint,
    named_steps,
    naming_checkpoint,
    prune,
    set_aside,
)
from kalmagrove.training.checkpoint_model import write_trained_model
from kalmagrove.training.config import NEUTRAL_OPTIONS, TrainConfig, plain_options, usual_options
from kalmagrove.training.energy import EnergyMeter, check_energy
from kalmagrove.training.environment import describe_environment, peak_memory_bytes
from kalmagrove.training.run import StepResult, TrainingDiverged, TrainingRun
from kalmagrove.training.run_folder import RunFolder, open_run_folder, require_same_data
from kalmagrove.training.saving import CheckpointWriter
from kalmagrove.training.trackers import TrackedMetrics, check_tracker
from kalmagrove.training.tracking import MetricsWriter
from kalmagrove.world import ALONE, World

EVALUATIONS = 10

_MAY_CHANGE = NEUTRAL_OPTIONS | {"data.source"}
"""Where a run's text lies may change too: it is the same by its content, or refused."""


class TrainingSession:
    """A run that lives in a folder.

    Args:
        config: The run's configuration; the folder must be new, empty, or of the same configuration.
        data: The packed text.
        folder: The run folder.
        world: The processes that train together; the first of them alone writes. All must see the folder.
        warn: Told in one line about each damaged checkpoint that was passed over.

    Raises:
        KalmaGroveError: The folder belongs to another run, or there are checkpoints and none of them is whole.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: TrainingData,
        folder: Path,
        *,
        world: World = ALONE,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        # Wrong options are found before anything is written.
        check_tracker(config.track)
        check_energy(config.energy)
        self.run, self.world = self._make_run(config, data, folder, world), world
        with ExitStack() as on_failure:
            on_failure.callback(self.run.loss.close)
            self.folder = self._open_folder(config, folder)
            on_failure.callback(self.folder.release)
            self.seconds, self.saved_step, self.saved_at = 0.0, -1, time.monotonic()
            self.evaluations: dict[int, float] = {}
            self.saved_steps: set[int] = set()
            self.writer = CheckpointWriter(self.folder.checkpoints_path, asynchronous=config.loop.save_in_background)
            self.metrics: TrackedMetrics | None = None
            self.energy: EnergyMeter | None = None
            on_failure.callback(self._end_watching)
            # A complete folder is only read.
            result = self.folder.read_result()
            if result is not None:
                require_same_data(result, self.run.data.fingerprint, self.folder.path)
            else:
                self._resume(warn)
                self._keep_source()
            self.resumed_from = self.run.step
            on_failure.pop_all()

    def _make_run(self, config: TrainConfig, data: TrainingData, folder: Path, world: World) -> TrainingRun:
        return TrainingRun(config, data, world)

    def _open_folder(self, config: TrainConfig, path: Path) -> RunFolder:
        """The folder, which the first process holds for all; where it is refused, all of them end for that reason."""
        folder, refusal = RunFolder(path), None
        if self.world.is_first:
            try:
                folder = open_run_folder(
                    path, plain_options(config), allow_changed=_MAY_CHANGE, usual=usual_options(config)
                )
            except (KalmaGroveError, OSError) as error:
                refusal = error
        is_refused = self.world.largest([refusal is not None], self.run.device)[0] > 0
        if refusal is not None:
            raise refusal
        if is_refused:
            raise UsageError("the first process could not open the run folder")
        return folder

    def _keep_source(self) -> None:
        """The same text may lie elsewhere than when the run began: the configuration says where it is now."""
        stored = self.folder.read_config()
        source = plain_options(self.run.config)["data"]["source"]
        if self.world.is_first and isinstance(stored.get("data"), dict) and stored["data"].get("source") != source:
            self.folder.write_config(stored | {"data": stored["data"] | {"source": source}})
        self.world.wait()

    def _resume(self, warn: Callable[[str], None]) -> None:
        checkpoint, damaged = latest_checkpoint(self.folder.checkpoints_path)
        for line in damaged:
            warn(line)
        if checkpoint is not None:
            self.run.restore(checkpoint)
            with naming_checkpoint(checkpoint.path):
                self.seconds = float(checkpoint.progress["seconds"])
            self.saved_step = self.run.step
        elif damaged:
            raise KalmaGroveError(
                f"no checkpoint in {self.folder.checkpoints_path} is whole; put one back from a copy, or delete that "
                "folder to train from the start"
            )
        self._agree_on_the_start()
        self.saved_steps = set(named_steps(self.folder.checkpoints_path))
        self.world.wait()
        if self.world.is_first:
            # So that they do not count among those that are kept.
            set_aside(self.folder.checkpoints_path, [line.partition(":")[0] for line in damaged])
            self.folder.truncate_metrics(self.run.step)
            self.metrics = TrackedMetrics(MetricsWriter(self.folder.metrics_path), self.run.config.track, self.folder)
            if self.run.config.energy:
                earlier = checkpoint.progress.get("energy") if checkpoint is not None else None
                self.energy = EnergyMeter(self.folder.path, earlier=earlier, whole_machine=self.world.size > 1)
            if not self.folder.environment_path.exists():
                write_json_atomic(self.folder.environment_path, describe_environment())
        self.world.wait()
        self.evaluations = {
            record["step"]: float(record["valid_loss"])
            for record in self.folder.read_metrics()
            if record.get("valid_loss") is not None
        }
        # The evaluation of this step may have been what the run died in.
        if self.run.step > 0 and self._evaluation_due() and self.run.step not in self.evaluations:
            self._evaluate()

    def _agree_on_the_start(self) -> None:
        newest = self.world.largest([self.run.step], self.run.device)[0]
        same = self.world.largest([self.run.step != newest], self.run.device)[0] == 0
        if not same:
            raise KalmaGroveError(
                f"process {self.world.rank} starts at step {self.run.step} and another one at step {newest:.0f}; all "
                f"machines must see the same run folder {self.folder.path}"
            )

    @property
    def finished(self) -> bool:
        """Whether the result is written."""
        return self.folder.read_result() is not None

    @property
    def steps_done(self) -> int:
        """Steps that need not be done any more."""
        return self.run.total_steps if self.finished else self.run.step

    def advance(self) -> StepResult:
        """One step, its line in the metrics, then a checkpoint and an evaluation where they are due.

        Raises:
            TrainingDiverged: The loss is not finite; the message names the last good checkpoint.
        """
        try:
            is_measured = self.run.config.loop.gradient_metrics and self._logging_due(self.run.step + 1)
            result = self.run.measured_step() if is_measured else self.run.train_step()
        except TrainingDiverged as error:
            self._write({"step": self.run.step + 1, "diverged": str(error)})
            kept = f"the last good checkpoint is step {self.saved_step}" if self.saved_step >= 0 else "none was saved"
            raise TrainingDiverged(f"{error}; {kept} in {self.folder.path}") from None
        self.seconds += result.seconds
        step = self.run.step
        if self._logging_due(step) or self._evaluation_due():
            self._write(self._record(result))
        # Saving comes before the evaluation: a crash there loses nothing.
        if self._saving_due():
            self.save()
        if self._evaluation_due():
            self._evaluate()
        return result

    def _logging_due(self, step: int) -> bool:
        return step % self.run.config.loop.log_every == 0

    def _saving_due(self) -> bool:
        loop = self.run.config.loop
        if self.run.done or loop.save_steps is not None:
            return self.run.done or self.run.step % (loop.save_steps or 1) == 0
        passed = time.monotonic() - self.saved_at
        return self.world.largest([passed], self.run.device)[0] >= (loop.save_seconds or 0.0)

    def _write(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(record)

    def _evaluation_due(self) -> bool:
        every = self.run.config.loop.eval_every or max(1, -(-self.run.total_steps // EVALUATIONS))
        return self.run.step % every == 0 or self.run.done

    def _evaluate(self) -> None:
        loss, step = self.run.validation_loss(), self.run.step
        self._write(
            {
                "step": step,
                "tokens": step * self.run.config.loop.tokens_per_step,
                "seconds": self.seconds,
                "valid_loss": loss,
            }
        )
        self.evaluations[step] = loss
        if step in self._best_steps() and self.saved_step != step:
            self.save()

    def _best_steps(self) -> list[int]:
        """Steps whose checkpoints are kept for their loss."""
        possible = {*self.saved_steps, self.run.step}
        finite = [step for step, loss in self.evaluations.items() if math.isfinite(loss) and step in possible]
        return sorted(finite, key=self.evaluations.__getitem__)[: self.run.config.loop.keep_best]

    def _record(self, result: StepResult) -> dict[str, Any]:
        tokens_per_step = self.run.config.loop.tokens_per_step
        return {
            "step": self.run.step,
            "tokens": self.run.step * tokens_per_step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": tokens_per_step / result.seconds,
            "step_seconds": result.seconds,
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.run.device),
        } | {
            name: value
            for name in ("update_ratio", "gradient_noise_scale")
            if (value := getattr(result, name)) is not None
        }

    def save(self) -> Path:
        """Writes a checkpoint of the present step, or begins to; all processes must call this together.

        Returns:
            The checkpoint's folder, which is there after :meth:`wait_for_saving`.

        Raises:
            OSError: This or the last checkpoint could not be written.
        """
        state, step = self.run.state(), self.run.step
        state["progress"] |= {"seconds": self.seconds, "config": plain_options(self.run.config)}
        if self.energy is not None:
            state["progress"]["energy"] = self.energy.used()
        if self.metrics is not None:
            # A run goes on after its checkpoint, so the lines before it must not get lost.
            self.metrics.sync()
        if self.world.is_first:
            self.writer.save(state, step=step, keep_last=self.run.config.loop.keep_last, keep_steps=self._best_steps())
        self.saved_steps.add(step)
        self.saved_step, self.saved_at = step, time.monotonic()
        return checkpoint_path(self.folder.checkpoints_path, step)

    def wait_for_saving(self) -> None:
        """Returns when every checkpoint is on the disk.

        Raises:
            OSError: The last one could not be written.
        """
        self.writer.wait()

    def export(self, scores: Mapping[str, Any] | None = None) -> Path:
        """Writes the model as a Hugging Face folder with its tokeniser and card; all processes must call this together.

        Args:
            scores: By split, for the card.
        """
        model = self.run.whole_model()
        if self.world.is_first:
            write_trained_model(model, self.run, self.folder.model_path, scores)
        return self.folder.model_path

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the model and then the result; a folder with a result is complete."""
        self.wait_for_saving()
        if self.world.is_first:
            keep_last = self.run.config.loop.keep_last
            prune(self.folder.checkpoints_path, self.run.step, keep_last, self._best_steps())
        best = [{"step": step, "valid_loss": self.evaluations[step]} for step in self._best_steps()]
        whole_result = result | {"seconds": self.seconds, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.export({split: result[split] for split in ("valid", "test") if split in result})
        if self.energy is not None:
            whole_result |= self.energy.result()
        if self.world.is_first:
            self.folder.write_result(whole_result | ({"best_checkpoints": best} if best else {}))
        self.world.wait()

    def close(self) -> None:
        """Gives the folder free when the checkpoint that is being written is on the disk.

        Raises:
            OSError: It could not be written.
        """
        try:
            self.wait_for_saving()
        finally:
            self.run.loss.close()
            self._end_watching()
            self.folder.release()

    def _end_watching(self) -> None:
        for watcher in (self.metrics, self.energy):
            if watcher is not None:
                watcher.close()
