"""A decoder on a fold: one training, stopped by the target's score on the validation part."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from kalmagrove.data.example_store import PackedExamples, prepare_examples
from kalmagrove.data.tables.codec import TableCodec, Value, open_codec
from kalmagrove.data.tables.reading import iter_rows
from kalmagrove.data.tables.source import table_source
from kalmagrove.evaluation.table_predictions import PredictionTerms
from kalmagrove.evaluation.table_scores import score_table
from kalmagrove.models.accounting import count_parameters
from kalmagrove.training.config import LoopConfig, ModelConfig, OptimConfig, TrainConfig
from kalmagrove.training.run import TrainingDiverged, TrainingRun
from tables_lab.data import Task

BATCH_SIZE, LOOKS, LAYERS = 16, 5, 3
LOOK_ORDERS, TEST_ORDERS = 4, 8
SIZES: dict[str, dict[str, Any]] = {
    "kalmagrove": {"hidden_size": 68, "head_dim": 16, "attention": "full"},
    "llama": {"hidden_size": 48, "head_dim": 12},
}
"""Widths at which both have as many parameters. Rows are short, and each cell may need any other: no coarse blocks."""
SETTINGS: tuple[dict[str, Any], ...] = ({"lr_scale": 1.0}, {"lr_scale": 0.5}, {"lr_scale": 2.0})


def fit(task: Task, folder: Path, family: str, setting: dict[str, Any], *, epochs: float) -> dict[str, Any]:
    """Trains on all columns of the training part; scores of the target on the validation and test part.

    Args:
        task: Of the folds.
        folder: Of a fold.
        family: kalmagrove or llama.
        setting: One of `SETTINGS`.
        epochs: Of the training part.
    """
    data = prepare_examples(table_source(str(folder), seed=0), folder / "packed")
    codec = open_codec(data.schema(), data.load_tokenizer())
    run = TrainingRun(_config(data, family, setting, epochs), data)
    target = codec.places[task.target]
    rows = {name: _values(codec, folder, name) for name in ("valid", "test")}
    best: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    started = time.perf_counter()
    terms = PredictionTerms(orders=LOOK_ORDERS, batch_size=256, precision=run.precision)
    for look in range(1, LOOKS + 1):
        try:
            while run.step < run.total_steps * look // LOOKS:
                run.train_step()
        except TrainingDiverged:
            break
        found = score_table(run.model, codec, rows["valid"], target, terms)
        name = "rmse" if "rmse" in found else "log_loss"
        if not best or not best[name] <= found[name]:
            best, weights = found, copy.deepcopy(run.model.state_dict())
    if not best:
        return {"diverged": True}
    run.model.load_state_dict(weights)
    return {
        "valid": best,
        "test": score_table(run.model, codec, rows["test"], target, replace(terms, orders=TEST_ORDERS)),
        "seconds": time.perf_counter() - started,
        "parameters": count_parameters(run.model).total,
        "tokens": run.step * BATCH_SIZE * run.config.loop.context_length,
    }


def _config(data: PackedExamples, family: str, setting: dict[str, Any], epochs: float) -> TrainConfig:
    context = data.longest - 1
    steps = max(LOOKS, int(epochs * data.splits["train"].documents / BATCH_SIZE))
    return TrainConfig(
        model=ModelConfig(preset=f"{family}-tiny", num_hidden_layers=LAYERS, **SIZES[family]),
        optim=OptimConfig(name="kalma", **setting),
        loop=LoopConfig(tokens=steps * BATCH_SIZE * context, batch_size=BATCH_SIZE, context_length=context),
    )


def _values(codec: TableCodec, folder: Path, name: str) -> list[dict[int, Value]]:
    return [codec.read(row) for row in iter_rows(folder / f"{name}.jsonl")]
