"""``kalmagrove adapt``: an adaptor trained from a configuration into a finished folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kalmagrove.adaptation.config import AdaptConfig
from kalmagrove.adaptation.run import AdaptorRun, AdaptorSession
from kalmagrove.data.packing import PackedText
from kalmagrove.errors import KalmaGroveError
from kalmagrove.evaluation.perplexity import Scores
from kalmagrove.training.trainer import complete, describe_device, require_scores, score_split


def adapt(config: AdaptConfig, data: PackedText, folder: Path, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains an adaptor, or goes on from the folder's last valid checkpoint; returns what ``result.json`` holds.

    Args:
        config: The run.
        data: The domain's text in the base's tokens.
        folder: The run folder; the adaptor is its folder ``adaptor``.
        say: Told what a person wants to know, a line at a time.

    Raises:
        Interrupted: A signal came; the state was saved.
        TrainingDiverged: The loss is not a number.
        KalmaGroveError: The folder belongs to another run, the base has changed, or the data does not fit.
    """
    session = AdaptorSession(config, data, folder, warn=lambda line: say(f"passed over {line}"))
    run = session.run
    result = complete(
        session,
        describe=lambda: describe(run),
        evaluate=lambda: scores_of(run),
        say=say,
        instead="another folder or name for a new adaptor",
    )
    base, parameters = result.get("base"), result.get("parameters")
    if not isinstance(base, dict) or not isinstance(parameters, dict) or "trained" not in parameters:
        raise KalmaGroveError(f"{session.folder.result_path} is not an adaptor's result; delete it and run again")
    require_scores(result | base, session.folder.result_path)
    return result


def describe(run: AdaptorRun) -> list[str]:
    """What is about to be trained: cores, base, length, device."""
    cores = run.adaptors.cores(run.config.adaptor.name)
    learned = sum(core.numel() for core in cores.values())
    frozen = sum(parameter.numel() for parameter in run.adaptors.model.parameters())
    return [
        f"adaptor {run.config.adaptor.name}: {learned:,} parameters in the cores of {len(cores)} layers, over "
        f"{frozen:,} frozen ones",
        f"{run.total_steps} steps of {run.config.loop.tokens_per_step:,} tokens on {describe_device(run)}",
    ]


def scores_of(run: AdaptorRun) -> dict[str, Any]:
    """Scores of the whole valid and test splits, with the adaptor and without."""
    with run.adaptors.disabled():
        base = {split: score_split(run, split).to_dict() for split in ("valid", "test")}
    own: dict[str, Scores] = {split: score_split(run, split) for split in ("valid", "test")}
    cores = run.adaptors.cores(run.config.adaptor.name)
    return {
        **{split: scores.to_dict() for split, scores in own.items()},
        "base": base,
        "parameters": {"trained": sum(core.numel() for core in cores.values())},
        "steps": run.step,
        "tokens": run.step * run.config.loop.tokens_per_step,
        "precision": run.precision,
        "device": run.device.type,
        "data_fingerprint": run.data.fingerprint,
    }
