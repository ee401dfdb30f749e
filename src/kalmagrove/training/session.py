"""A training run and its folder together: goes on from the last checkpoint, writes metrics, saves, finishes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kalmagrove.data.packing import PackedText
from kalmagrove.data.tokenizer import save_tokenizer
from kalmagrove.files import write_json_atomic
from kalmagrove.models.convert import save_model
from kalmagrove.training.checkpoint import latest_checkpoint, save_checkpoint
from kalmagrove.training.config import NEUTRAL_OPTIONS, TrainConfig, plain_options
from kalmagrove.training.environment import describe_environment, peak_memory_bytes
from kalmagrove.training.run import StepResult, TrainingDiverged, TrainingRun
from kalmagrove.training.run_folder import RunFolder, open_run_folder
from kalmagrove.training.tracking import MetricsWriter

EVALUATIONS = 10


class TrainingSession:
    """A run that lives in a folder.

    Args:
        config: The run's configuration; the folder must be new, empty, or of the same configuration.
        data: The packed text.
        folder: The run folder.
        warn: Told in one line about each damaged checkpoint that was passed over.
    """

    def __init__(
        self, config: TrainConfig, data: PackedText, folder: Path, *, warn: Callable[[str], None] = lambda _: None
    ) -> None:
        # Wrong options are found before anything is written.
        self.run = TrainingRun(config, data)
        self.folder: RunFolder = open_run_folder(folder, plain_options(config), allow_changed=NEUTRAL_OPTIONS)
        self.seconds, self.saved_step = 0.0, -1
        try:
            # A complete folder is only read.
            if not self.finished:
                self._resume(warn)
            self.resumed_from = self.run.step
        except BaseException:
            self.folder.release()
            raise

    def _resume(self, warn: Callable[[str], None]) -> None:
        checkpoint, damaged = latest_checkpoint(self.folder.checkpoints_path)
        for line in damaged:
            warn(line)
        if checkpoint is not None:
            self.run.restore(checkpoint)
            self.seconds = float(checkpoint.progress["seconds"])
            self.saved_step = self.run.step
        self.folder.truncate_metrics(self.run.step)
        self.metrics = MetricsWriter(self.folder.metrics_path)
        if not self.folder.environment_path.exists():
            write_json_atomic(self.folder.environment_path, describe_environment())
        # The evaluation of this step may have been what the run died in.
        evaluated = {record["step"] for record in self.folder.read_metrics() if "valid_loss" in record}
        if self.run.step > 0 and self._evaluation_due() and self.run.step not in evaluated:
            self._evaluate()

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
            result = self.run.train_step()
        except TrainingDiverged as error:
            kept = f"the last good checkpoint is step {self.saved_step}" if self.saved_step >= 0 else "none was saved"
            raise TrainingDiverged(f"{error}; {kept} in {self.folder.path}") from None
        self.seconds += result.seconds
        loop, step = self.run.config.loop, self.run.step
        if step % loop.log_every == 0 or self._evaluation_due():
            self.metrics.write(self._record(result))
        # Saving comes before the evaluation: a crash there loses nothing.
        if step % loop.save_every == 0 or self.run.done:
            self.save()
        if self._evaluation_due():
            self._evaluate()
        return result

    def _evaluation_due(self) -> bool:
        every = self.run.config.loop.eval_every or max(1, -(-self.run.total_steps // EVALUATIONS))
        return self.run.step % every == 0 or self.run.done

    def _evaluate(self) -> None:
        self.metrics.write(
            {
                "step": self.run.step,
                "tokens": self.run.step * self.run.config.loop.tokens_per_step,
                "seconds": self.seconds,
                "valid_loss": self.run.validation_loss(),
            }
        )

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
        }

    def save(self) -> Path:
        """Writes a checkpoint of the present step, once."""
        state = self.run.state()
        state["progress"]["seconds"] = self.seconds
        path = save_checkpoint(
            self.folder.checkpoints_path, step=self.run.step, keep_last=self.run.config.loop.keep_last, **state
        )
        self.saved_step = self.run.step
        return path

    def export(self) -> Path:
        """Writes the model as a Hugging Face folder with its tokeniser."""
        path = self.folder.model_path
        temporary = path.with_name(".model.partial")
        save_model(self.run.model, temporary)
        save_tokenizer(self.run.data.load_tokenizer(), temporary, context_length=self.run.config.loop.context_length)
        if path.exists():
            _remove_tree(path)
        temporary.rename(path)
        return path

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the model and then the result; a folder with a result is complete."""
        self.export()
        self.folder.write_result(result | {"seconds": self.seconds, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    def close(self) -> None:
        """Gives the folder free."""
        self.folder.release()


def _remove_tree(path: Path) -> None:
    import shutil

    shutil.rmtree(path)
