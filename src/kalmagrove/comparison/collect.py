"""Builds ``results.json`` of a comparison from its run folders, finished or not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kalmagrove.comparison.config import CompareConfig, Contestant, Rates
from kalmagrove.comparison.runs import chosen_rates, run_path
from kalmagrove.comparison.spikes import spikes_in_a_thousand
from kalmagrove.comparison.timing import BLOCK, TIMING_WARMUP
from kalmagrove.data.example_store import PackedExamples
from kalmagrove.data.training_data import TrainingData
from kalmagrove.models.accounting import build_empty, count_parameters, decoding_bytes, training_flops_per_token
from kalmagrove.models.build import model_config
from kalmagrove.training.config import is_plain_transformer, is_usual_transformer
from kalmagrove.training.run_folder import RunFolder

MOST_POINTS = 200


def collect_results(
    config: CompareConfig,
    data: TrainingData,
    folder: Path,
    *,
    plan: dict[str, Any],
    command: str,
    created: str,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Everything that the report shows, from files alone.

    Args:
        config: The comparison.
        data: Its text.
        folder: Its folder.
        plan: ``steps``, and by name of a contestant ``scales`` (the learning-rate factor that was chosen),
            ``auxiliary_scales`` (that of embeddings, head and vectors), ``trials`` (the valid losses of all) and
            ``memory`` (bytes); ``timing`` where steps were timed apart.
        command: Repeats the comparison.
        created: ISO date.
        environment: Of the machine.
    """
    contestants, seeds, steps = config.contestants(), config.seed_list(), int(plan["steps"])
    models = [_model(config, data, folder, contestant, plan) for contestant in contestants]
    baseline = _baseline(contestants, models)
    tokens = steps * config.loop.tokens_per_step
    return {
        "format": 1,
        "title": " against ".join(contestant.name for contestant in reversed(contestants)),
        "command": command,
        "created": created,
        "data": {
            "source": data.source or "the standard library of the running Python (built-in corpus)",
            "fingerprint": data.fingerprint,
            "vocab_size": data.vocab_size,
            "tokenizer_fingerprint": data.tokenizer_fingerprint,
            "modality": config.data.modality,
            "splits": {
                name: {key: getattr(info, key) for key in ("tokens", "bytes", "words", "documents")}
                for name, info in data.splits.items()
            },
        },
        "budget": {
            "tokens": tokens,
            "steps": steps,
            "tokens_per_step": config.loop.tokens_per_step,
            "context_length": config.loop.context_length,
            "epochs": epochs_of(config, data, steps),
        },
        "seeds": seeds,
        "trials": config.trials,
        "trial_tokens": config.trial_steps(steps) * config.loop.tokens_per_step,
        "rechecks": plan.get("rechecks", []),
        "auxiliary_trials": plan.get("auxiliary_trials", []),
        "environment": environment,
        "side_by_side": plan.get("side_by_side", False),
        "timing_environment": plan.get("timing", {}).get("environment"),
        "baseline": baseline,
        "candidate": _candidate(contestants, baseline),
        "models": models,
        "paired_time": [
            {
                "model": contestant.name,
                "baseline": baseline,
                "ratios": _ratios(config, folder, contestant, baseline, plan),
            }
            for contestant in contestants
            if contestant.name != baseline
        ],
    }


def _model(
    config: CompareConfig, data: TrainingData, folder: Path, contestant: Contestant, plan: dict[str, Any]
) -> dict[str, Any]:
    steps, length = int(plan["steps"]), config.loop.context_length
    rates = chosen_rates(plan, contestant)
    train_config = config.train_config(contestant, rates=rates, seed=config.seed_list()[0], steps=steps)
    options = {**data.model_options(), "max_position_embeddings": length}
    decoder = model_config(contestant.preset, options)
    parameters = count_parameters(build_empty(decoder))
    runs = [_run(folder, contestant, rates, seed) for seed in config.seed_list()]
    is_apart = plan.get("side_by_side", False)
    measured = (
        [_timed_apart(plan, contestant.name)]
        if is_apart
        else [_step_seconds(folder, contestant, rates, seed) for seed in config.seed_list()]
    )
    seconds = [block / size for times in measured for size, block in _blocks(times).values()]
    step_seconds = statistics.median(seconds) if seconds else None
    if is_apart:
        _retime(runs, step_seconds, config.loop.tokens_per_step)
    precision = next((run["precision"] for run in runs if run["precision"]), config.loop.precision)
    return {
        "name": contestant.name,
        "preset": contestant.preset,
        "optim": contestant.optim,
        "precision": precision,
        "model_config": _flat(decoder.to_diff_dict()),
        "optim_config": _flat(asdict(train_config.optim)),
        "lr_trials": plan.get("trials", {}).get(contestant.name, []),
        "lr_scale": rates.scale,
        "auxiliary_scale": rates.auxiliary,
        "parameters": {
            "total": parameters.total,
            "embedding": parameters.embedding,
            "non_embedding": parameters.non_embedding,
        },
        "flops_per_token": round(training_flops_per_token(decoder, length)),
        "decode_state_bytes": decoding_bytes(decoder, length),
        "step_seconds": step_seconds,
        "peak_memory_bytes": plan.get("memory", {}).get(contestant.name),
        "runs": [{key: value for key, value in run.items() if key != "precision"} for run in runs],
    }


def _run(folder: Path, contestant: Contestant, rates: Rates, seed: int) -> dict[str, Any]:
    path = run_path(folder, contestant, rates, seed)
    run = RunFolder(path)
    result = run.read_result() if path.is_dir() else None
    metrics = run.read_metrics() if path.is_dir() else []
    curve = _thin(_smooth(metrics))
    valid = [m for m in metrics if m.get("valid_loss") is not None]
    return {
        "seed": seed,
        "folder": path.relative_to(folder).as_posix(),
        "diverged": bool(result and result.get("diverged")),
        "seconds": result.get("seconds") if result else None,
        "valid": _scores(result, "valid"),
        "test": _scores(result, "test"),
        "precision": result.get("precision") if result else None,
        "curve": {key: [m[key] for m in curve] for key in ("tokens", "seconds", "loss")},
        "valid_curve": {"tokens": [m["tokens"] for m in valid], "loss": [m["valid_loss"] for m in valid]},
        "spikes": spikes_in_a_thousand([m["loss"] for m in metrics if m.get("loss") is not None]),
        "source": run.read_environment().get("source"),
    }


def _scores(result: Mapping[str, Any] | None, split: str) -> dict[str, Any] | None:
    """Of a split, with an optimum where there is none as well."""
    found = result.get(split) if result else None
    return None if found is None else {"optimum": None} | found


def _smooth(metrics: list[dict[str, Any]], memory: float = 0.9) -> list[dict[str, Any]]:
    """The loss as an exponential moving average that starts unbiased, so that curves can be told apart."""
    average, weight, smoothed = 0.0, 0.0, []
    for record in metrics:
        if record.get("loss") is None:
            continue
        average = memory * average + (1 - memory) * record["loss"]
        weight = memory * weight + (1 - memory)
        smoothed.append(record | {"loss": average / weight})
    return smoothed


def _thin(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step = max(1, -(-len(records) // MOST_POINTS))
    return records[::-step][::-1]


def _step_seconds(folder: Path, contestant: Contestant, rates: Rates, seed: int) -> dict[int, float]:
    path = run_path(folder, contestant, rates, seed)
    metrics = RunFolder(path).read_metrics() if path.is_dir() else []
    return {m["step"]: m["step_seconds"] for m in metrics if "step_seconds" in m and m["step"] > TIMING_WARMUP}


def _timed_apart(plan: Mapping[str, Any], name: str) -> dict[int, float]:
    """Times of steps that took turns when all runs were done, as if they were the steps behind the warm-up."""
    seconds = plan.get("timing", {}).get("step_seconds", {}).get(name, [])
    return dict(enumerate(seconds, TIMING_WARMUP + 1))


def epochs_of(config: CompareConfig, data: TrainingData, steps: int) -> float:
    """Passes over the training split: of examples, which fill no context, by their number."""
    train = data.splits["train"]
    if isinstance(data, PackedExamples):
        return steps * config.loop.batch_size / train.documents
    return steps * config.loop.tokens_per_step / train.tokens


def _retime(runs: list[dict[str, Any]], step_seconds: float | None, tokens_per_step: int) -> None:
    """Replaces the seconds of runs that stood side by side by those that they would have taken alone, if known."""
    for run in runs:
        curve = run["curve"]
        curve["seconds"] = [tokens / tokens_per_step * (step_seconds or 0.0) for tokens in curve["tokens"]]
        if run["seconds"] is not None:
            run["seconds"] = None if step_seconds is None else next(reversed(curve["seconds"]), 0.0)


def _blocks(seconds: dict[int, float]) -> dict[int, tuple[int, float]]:
    """Number and total time of the steps of each whole block of ten; of a shorter one where there is no other.

    Some optimisers do more work every tenth step, which a median over single steps would not see.
    """
    blocks: dict[int, list[float]] = {}
    for step in sorted(seconds):
        blocks.setdefault((step - 1) // BLOCK, []).append(seconds[step])
    whole = {index: block for index, block in blocks.items() if len(block) == BLOCK} or blocks
    return {index: (len(block), sum(block)) for index, block in whole.items()}


def _ratios(
    config: CompareConfig, folder: Path, contestant: Contestant, baseline: str, plan: dict[str, Any]
) -> list[float]:
    """Time of ten steps over the baseline's for the same steps of the same seed, which ran right beside them.

    With the first seed those of the rates that were chosen first: at rates that were found afterwards two models may
    not have stood beside one another, as trials that became final runs do not where the rates differ.
    """
    if plan.get("side_by_side"):
        own, theirs = (_blocks(_timed_apart(plan, name)) for name in (contestant.name, baseline))
        return [own[index][1] / theirs[index][1] for index in sorted(own.keys() & theirs.keys())]
    pair = (contestant, next(c for c in config.contestants() if c.name == baseline))
    rates = [chosen_rates(plan, c) for c in pair]
    chosen = {recheck["model"]: float(recheck["chosen_before"]) for recheck in plan.get("rechecks", [])}
    first = [Rates(chosen.get(c.name, own.scale)) for c, own in zip(pair, rates, strict=True)]
    trials_are_runs = config.trials > 1 and config.trial_steps(int(plan["steps"])) == int(plan["steps"])
    ratios: list[float] = []
    for seed in config.seed_list():
        is_first = seed == config.seed_list()[0]
        if is_first and trials_are_runs and first[0] != first[1]:
            continue
        both = [_step_seconds(folder, c, own, seed) for c, own in zip(pair, first if is_first else rates, strict=True)]
        common = both[0].keys() & both[1].keys()
        ours, reference = (_blocks({step: times[step] for step in common}) for times in both)
        ratios += [ours[index][1] / reference[index][1] for index in sorted(ours)]
    return ratios


def _baseline(contestants: list[Contestant], models: list[dict[str, Any]]) -> str:
    """The better of the plain Transformers on the validation split; the first model where there is none.

    Where some of them are trained as is usual, only those.
    """
    plain = [(c, m) for c, m in zip(contestants, models, strict=True) if is_plain_transformer(c.preset)]
    if not plain:
        return contestants[0].name
    usual = [m for c, m in plain if is_usual_transformer(c.preset, c.optim)] or [m for _, m in plain]

    def mean_loss(model: dict[str, Any]) -> float:
        losses = [run["valid"]["loss"] for run in model["runs"] if run["valid"] is not None]
        return statistics.fmean(losses) if losses else float("inf")

    name: str = min(usual, key=mean_loss)["name"]
    return name


def _candidate(contestants: list[Contestant], baseline: str) -> str:
    others = [c for c in contestants if c.name != baseline]
    ours = [c for c in others if c.family == "kalmagrove"]
    return (ours or others)[-1].name


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Values that a table can show."""
    return {name: _shown(value) for name, value in options.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return "; ".join(str(_shown(item)) for item in value)
    return value
