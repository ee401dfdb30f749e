"""Trees and linear models of scikit-learn on the same folds, each setting stopped by the validation part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler

from kalmagrove.evaluation.table_scores import score_numbers
from tables_lab.data import Row, Task, is_class, read_part

MOST_TREES = 400
TREES = ({"learning_rate": 0.1}, {"learning_rate": 0.05}, {"learning_rate": 0.1, "max_leaf_nodes": 8})
STRENGTHS = ({"strength": 1.0}, {"strength": 10.0}, {"strength": 0.1})
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {"trees": TREES, "linear": STRENGTHS}


def fit(task: Task, folder: Path, method: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Fits one setting on the training part; scores of the validation and test part.

    Args:
        task: Of the folds.
        folder: Of a fold.
        method: trees or linear.
        setting: One of `SETTINGS`.
    """
    parts = {name: read_part(folder, name) for name in ("train", "valid", "test")}
    classes = sorted({str(row[task.target]) for rows in parts.values() for row in rows})
    is_of_classes = is_class(task, parts["train"])
    targets = {name: np.array([row[task.target] for row in rows]) for name, rows in parts.items()}
    started = time.perf_counter()
    transform, is_word = _features(task, parts["train"], ordinal=method == "trees")
    inputs = {name: transform(rows) for name, rows in parts.items()}
    best: dict[str, Any] = {}
    names, chosen_by = classes if is_of_classes else None, "log_loss" if is_of_classes else "rmse"
    for valid, test in _predictions(method, setting, inputs, targets["train"], is_word, is_of_classes):
        scores = _scores(valid, targets["valid"], names)
        if not best or scores[chosen_by] < best["valid"][chosen_by]:
            best = {"valid": scores, "test": _scores(test, targets["test"], names)}
    return {**best, "seconds": time.perf_counter() - started}


def _features(task: Task, rows: list[Row], *, ordinal: bool) -> tuple[Any, list[bool]]:
    """A function from rows to inputs, and which of them are words as numbers."""
    names = [name for name in rows[0] if name != task.target]
    words = [name for name in names if isinstance(rows[0][name], str)]
    numbers = [name for name in names if name not in words]

    def table(of: list[Row]) -> np.ndarray:
        return np.array([[row[name] for name in (*words, *numbers)] for row in of], dtype=object)

    first = list(range(len(words)))
    if ordinal:
        encoder = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
        transformer = ColumnTransformer([("words", encoder, first)], remainder="passthrough")
    else:
        hot = OneHotEncoder(handle_unknown="ignore")
        others = list(range(len(words), len(names)))
        steps = [("words", hot, first), ("numbers", StandardScaler(), others)]
        transformer = ColumnTransformer(steps, sparse_threshold=0)
    transformer.fit(table(rows))
    is_word = [name in words for name in (*words, *numbers)]
    return lambda of: np.asarray(transformer.transform(table(of)), dtype=float), is_word


def _predictions(
    method: str,
    setting: dict[str, Any],
    inputs: dict[str, np.ndarray],
    targets: np.ndarray,
    is_word: list[bool],
    is_of_classes: bool,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predictions of the validation and test part: for each number of trees, or once."""
    if method == "linear":
        strength = setting["strength"]
        linear: Any = LogisticRegression(C=1 / strength, max_iter=2000) if is_of_classes else Ridge(alpha=strength)
        linear.fit(inputs["train"], targets)
        predict = linear.predict_proba if is_of_classes else linear.predict
        yield predict(inputs["valid"]), predict(inputs["test"])
        return
    kind: Any = HistGradientBoostingClassifier if is_of_classes else HistGradientBoostingRegressor
    options = {"max_iter": MOST_TREES, "early_stopping": False, "random_state": 0, "categorical_features": is_word}
    trees = kind(**options, **setting).fit(inputs["train"], targets)
    staged = trees.staged_predict_proba if is_of_classes else trees.staged_predict
    yield from zip(staged(inputs["valid"]), staged(inputs["test"]), strict=True)


def _scores(predictions: np.ndarray, truth: np.ndarray, classes: list[str] | None) -> dict[str, float]:
    if classes is None:
        return score_numbers(predictions, truth.astype(float))
    scores = {
        "accuracy": float(np.mean(np.array(classes)[predictions.argmax(axis=1)] == truth)),
        "log_loss": float(log_loss(truth, predictions, labels=classes)),
    }
    if len(classes) == 2:
        scores["auc"] = float(roc_auc_score(truth == classes[1], predictions[:, 1]))
    return scores
