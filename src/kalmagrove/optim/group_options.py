"""The options of one of Kalma's groups: which are sound, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from kalmagrove.optim.layout import Layout

METHODS = ("kalma", "table", "adamw", "exact")


def check_group(group: dict[str, Any]) -> None:
    """Refuses settings out of range and parameters that do not fit the group's method."""
    for name, low, high in (
        ("lr", 0.0, float("inf")),
        ("weight_decay", 0.0, float("inf")),
        ("momentum", 0.0, 1.0),
        ("variance_decay", 0.0, 1.0),
        ("covariance_decay", 0.0, 1.0),
        ("eps", 0.0, float("inf")),
    ):
        _check_range(name, float(group[name]), low, high)
    for beta in group["betas"]:
        _check_range("betas", beta, 0.0, 1.0)
    for name in ("damping", "noise", "prior"):
        if not 0 < group[name] < float("inf"):
            raise ValueError(f"{name} must be positive, got {group[name]}")
    if not 0 < group["forgetting"] <= 1:
        raise ValueError(f"forgetting must be in (0, 1], got {group['forgetting']}")
    for name in ("refresh_every", "turn_every", "block_size"):
        if group[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {group[name]}")
    if group["method"] is None:
        matrices = {p.ndim == 2 for p in group["params"]}
        if len(matrices) > 1:
            raise ValueError(
                "a group of matrices and vectors needs to be divided: use kalma_groups(model), or give each group a "
                "method"
            )
        group["method"] = "kalma" if matrices != {False} else "adamw"
    if group["method"] not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {group['method']!r}")
    for parameter in group["params"]:
        if parameter.is_complex() or parameter.is_sparse:
            raise ValueError("Kalma needs dense real parameters; give complex or sparse ones to another optimiser")
        if group["method"] == "exact" and (parameter.ndim != 2 or group["transposed"] or group["split_sizes"]):
            raise ValueError(
                f"method exact needs 2-D parameters stored as (outputs, inputs), each one matrix; a parameter of shape "
                f"{tuple(parameter.shape)} with its options is not: use kalma or adamw"
            )
        if group["method"] in ("kalma", "table"):
            layout_of(group).check(parameter.shape)


def layout_of(group: dict[str, Any]) -> Layout:
    """How the group's parameters hold their matrices."""
    return Layout(group["transposed"], group["split_sizes"], group["stacked"])


def block_size_of(group: dict[str, Any]) -> int:
    """The exact method never cuts P."""
    return 2**62 if group["method"] == "exact" else int(group["block_size"])


def split_by_method(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Groups stay as they are; bare parameters become a group of matrices and a group of the rest."""
    items = list(params)
    if items and isinstance(items[0], dict):
        return items
    split: dict[Literal["kalma", "adamw"], list[Any]] = {"kalma": [], "adamw": []}
    for item in items:
        parameter = item[1] if isinstance(item, tuple) else item
        split["kalma" if parameter.ndim == 2 else "adamw"].append(item)
    return [{"method": method, "params": members} for method, members in split.items() if members]


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), got {value}")
