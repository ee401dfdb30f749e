"""``kalmagrove train``: one run from a configuration to a finished folder."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kalmagrove.data.example_store import PackedExamples
from kalmagrove.data.synthetic.options import is_synthetic
from kalmagrove.data.training_data import TrainingData
from kalmagrove.errors import KalmaGroveError
from kalmagrove.evaluation.examples import score_examples
from kalmagrove.evaluation.perplexity import Scores, describe_optimum, score_tokens
from kalmagrove.evaluation.synthetic import reference_of, with_references
from kalmagrove.models.accounting import count_parameters, training_flops_per_token
from kalmagrove.optim.groups import describe_groups, kalma_groups
from kalmagrove.optim.kalma import Kalma
from kalmagrove.training.config import TrainConfig
from kalmagrove.training.environment import peak_memory_bytes
from kalmagrove.training.run import TrainingRun
from kalmagrove.training.session import TrainingSession
from kalmagrove.training.signals import Interrupted, StopRequest
from kalmagrove.training.tracking import ProgressBar
from kalmagrove.world import ALONE, World, is_lost_connection


def train(
    config: TrainConfig, data: TrainingData, folder: Path, *, say: Callable[[str], None], world: World = ALONE
) -> dict[str, Any]:
    """Trains, or goes on from the folder's last valid checkpoint, and returns what ``result.json`` holds.

    Args:
        config: The run.
        data: The packed text or examples.
        folder: The run folder.
        say: Told what a person wants to know, a line at a time.
        world: The processes that train together; each of them calls this.

    Raises:
        Interrupted: A signal came; the state was saved.
        ProcessLost: Another process is gone; where the parameters were whole, the state was saved.
        TrainingDiverged: The loss is not a number.
        KalmaGroveError: The folder belongs to another run, or the data does not fit.
    """
    session = TrainingSession(config, data, folder, world=world, warn=lambda line: say(f"passed over {line}"))

    def evaluate() -> dict[str, Any]:
        result = evaluate_run(session.run, ("valid", "test"))
        for line in describe_optimum(result["test"]):
            say(line)
        return result

    return complete(session, describe=lambda: describe_run(session.run), evaluate=evaluate, say=say)


def complete(
    session: TrainingSession,
    *,
    describe: Callable[[], list[str]],
    evaluate: Callable[[], dict[str, Any]],
    say: Callable[[str], None],
    instead: str = "another folder for a new run",
) -> dict[str, Any]:
    """All that is left of a run; returns what ``result.json`` holds, and closes the session.

    Args:
        session: The run in its folder.
        describe: Lines about what is about to be trained.
        evaluate: The scores of what was trained.
        say: Told what a person wants to know, a line at a time.
        instead: What to choose where the run is complete already.

    Raises:
        Interrupted: A signal came; the state was saved.
        ProcessLost: Another process is gone; where the parameters were whole, the state was saved.
        TrainingDiverged: The loss is not a number.
        KalmaGroveError: The folder holds a result without scores.
    """
    folder = session.folder
    try:
        done = folder.read_result()
        if done is not None:
            require_scores(done, folder.result_path)
            say(f"{folder.path} is complete already; choose {instead}")
            return done
        for line in describe():
            say(line)
        if session.resumed_from:
            say(f"going on from step {session.resumed_from}")
        run_to_the_end(session)
        # Training is saved by now: an evaluation that fails loses nothing.
        result = evaluate() | {"peak_memory_bytes": peak_memory_bytes(session.run.device)}
        session.finish(result)
        return folder.read_result() or result
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise _process_lost(session) from error
    finally:
        session.close()


def require_scores(result: dict[str, Any], path: Path) -> None:
    """That a result has what is shown of it.

    Raises:
        KalmaGroveError: It has not.
    """
    test = result.get("test")
    shown = [result.get("tokens"), result.get("seconds")]
    # A perplexity that is too large for a number is null.
    shown += [test.get("bits_per_byte"), test.get("perplexity", "") or 0.0] if isinstance(test, dict) else [None]
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in shown):
        raise KalmaGroveError(f"{path} lacks the scores of a run; delete it and run again")


def describe_run(run: TrainingRun) -> list[str]:
    """What is about to be trained: model, optimiser, length, device."""
    parameters = count_parameters(run.model)
    lines = [
        f"{run.config.model.preset}: {parameters.total:,} parameters ({parameters.non_embedding:,} without embeddings)",
        f"{run.total_steps} steps of {run.config.loop.tokens_per_step:,} tokens on {describe_device(run)}",
    ]
    context = run.config.loop.context_length
    if isinstance(run.data, PackedExamples) and run.data.longest - 1 < context:
        longest = run.data.longest - 1
        lines.append(
            f"the longest example is {longest} tokens, and {context} of each are counted: with --loop.context_length "
            f"{longest} the same --tokens are {context / longest:.1f} times as many steps"
        )
    optim = run.config.optim
    groups = kalma_groups(run.model, weight_decay=optim.weight_decay, **optim.peak_rates())
    methods = {"kalma": optim.name} | ({} if optim.name == "kalma" else {"table": "adamw"})
    shown = [group | {"method": methods.get(group["method"], group["method"])} for group in groups]
    return [*lines, *describe_groups(shown).splitlines()]


def describe_device(run: TrainingRun) -> str:
    """Device, number type, and on a CPU its threads."""
    threads = f", threads: {torch.get_num_threads()}" if run.device.type == "cpu" else ""
    return f"{run.device.type}, {run.precision}{threads}"


class ProcessLost(KalmaGroveError):
    """A step could not be done together, because another process ended or its machine cannot be reached."""


def run_to_the_end(session: TrainingSession) -> None:
    """All steps that are left, with a progress bar, until the last one or a signal.

    Raises:
        Interrupted: A signal came; the state was saved.
        ProcessLost: Another process is gone.
        TrainingDiverged: The loss is not a number.
    """
    run, world = session.run, session.world
    with StopRequest() as stop, _progress_of(session) as progress:
        while not run.done:
            try:
                result = session.advance()
                number = int(world.largest([stop.number or 0], run.device)[0])
            except RuntimeError as error:
                if not is_lost_connection(error):
                    raise
                # The signal by which a launcher ends the processes that are left must not end this, nor what it says.
                stop.outlive()
                raise _process_lost(session, _save_alone(session)) from error
            progress.update(run.step, result.loss, run.config.loop.tokens_per_step / result.seconds)
            if number and not run.done:
                path = session.save()
                session.wait_for_saving()
                # A launcher ends all processes when one has ended: the first must have written by then.
                world.wait()
                raise Interrupted(
                    number, f"stopped at step {run.step}; saved {path}; the same command goes on from there"
                )


def _progress_of(session: TrainingSession) -> ProgressBar:
    shown = sys.stderr if session.world.is_first else io.StringIO()
    return ProgressBar(session.run.total_steps, start_step=session.run.step, stream=shown)


def _save_alone(session: TrainingSession) -> Path | None:
    """Saves without the other processes, where this one has everything; None where not."""
    run = session.run
    divided = any(isinstance(optimizer, Kalma) and optimizer.divides_work for optimizer in run.optimizers)
    if run.loss.sharded or divided or not run.is_whole or not session.world.is_first:
        return None
    path = session.save()
    session.wait_for_saving()
    return path


def _process_lost(session: TrainingSession, saved: Path | None = None) -> ProcessLost:
    lost = f"process {session.world.rank} lost the connection to another one after step {session.run.step}"
    if saved is None:
        return ProcessLost(f"{lost}; the same command goes on from the last checkpoint")
    return ProcessLost(f"{lost}; saved {saved}; the same command goes on from there")


def evaluate_run(run: TrainingRun, splits: tuple[str, ...]) -> dict[str, Any]:
    """Scores of whole splits, and what the model costs."""
    scores = {split: score_split(run, split).to_dict() for split in splits}
    parameters = count_parameters(run.model)
    return {
        **scores,
        "parameters": {
            "total": parameters.total,
            "embedding": parameters.embedding,
            "non_embedding": parameters.non_embedding,
        },
        "flops_per_token": training_flops_per_token(run.model_config, run.config.loop.context_length),
        "steps": run.step,
        "tokens": run.step * run.config.loop.tokens_per_step,
        "precision": run.precision,
        "device": run.device.type,
        "data_fingerprint": run.data.fingerprint,
    }


def score_split(run: TrainingRun, split: str) -> Scores:
    """Scores of one split with the run's context and precision; of a synthetic task, with its optimum."""
    if isinstance(run.data, PackedExamples):
        return score_examples(run.model, run.data, split, device=run.device, precision=run.precision, world=run.world)
    info, source, length = run.data.splits[split], run.data.source, run.config.loop.context_length
    tokens = run.data.tokens(split)
    terms: dict[str, Any] = {
        "context_length": length,
        "stride": length,
        "vocab_size": run.model_config.vocab_size,
        "device": run.device,
        "precision": run.precision,
    }
    scores = score_tokens(run.model, tokens, words=info.words, text_bytes=info.bytes, world=run.world, **terms)
    return with_references(scores, [reference_of(run.model, source, tokens, **terms)] if is_synthetic(source) else [])
