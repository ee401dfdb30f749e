"""Optimisers by name, with the same care for each: matrices and the rest have their own settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from kalmagrove.optim.groups import kalma_groups
from kalmagrove.optim.kalma import Kalma

SOAP_BETAS, SOAP_FREQUENCY = (0.9, 0.99), 3
"""The better of those tried in ``benchmarks/optimizers.py``; and steps between turns of its bases, as Kalma's."""


def build_optimizers(
    name: Literal["kalma", "adamw", "muon", "soap"],
    model: nn.Module,
    *,
    lr: float,
    auxiliary_lr: float = 2e-2,
    core_lr: float = 2e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.9,
    damping: float = 0.1,
    refresh_every: int = 10,
    betas: tuple[float, float] = (0.9, 0.95),
    divide_work: bool = False,
) -> list[torch.optim.Optimizer]:
    """The optimisers of a model: Kalma (attached), AdamW, or torch's Muon or SOAP with AdamW beside it.

    Args:
        name: Which.
        model: Its parameters are divided by :func:`~kalmagrove.optim.groups.kalma_groups`.
        lr: Of the hidden matrices.
        auxiliary_lr: Of embeddings, heads and vectors: a rate of their own is worth more to AdamW than to the others.
        core_lr: Of Grove's cores that are not matrices.
        weight_decay: Of the hidden matrices.
        momentum: Of Kalma and Muon.
        damping: Of Kalma's P.
        refresh_every: Steps between refreshes of Kalma's P.
        betas: AdamW's.
        divide_work: Whether the ranks of a distributed run divide Kalma's work and statistics.

    Returns:
        The optimisers; each group keeps its peak rate in ``initial_lr``.

    Raises:
        ValueError: The name is unknown.
        ModuleNotFoundError: SOAP is asked for without pytorch-optimizer.
    """
    optimizers: list[torch.optim.Optimizer]
    groups = kalma_groups(model, lr=lr, weight_decay=weight_decay, auxiliary_lr=auxiliary_lr, core_lr=core_lr)
    if name == "kalma":
        kalma = Kalma(groups, lr=lr, momentum=momentum, damping=damping, refresh_every=refresh_every, betas=betas)
        kalma.attach(model, divide_work=divide_work)
        optimizers = [kalma]
    elif name == "muon":
        matrices, rest = _matrices_and_rest(groups)
        optimizers = [
            torch.optim.Muon(
                group["params"],
                lr=lr,
                weight_decay=weight_decay,
                momentum=momentum,
                adjust_lr_fn="match_rms_adamw",
            )
            for group in matrices
        ]
        if rest:
            optimizers.append(_adamw(rest, betas))
    elif name == "soap":
        from pytorch_optimizer import SOAP

        matrices, rest = _matrices_and_rest(groups)
        optimizers = [SOAP(plain_groups(matrices), lr=lr, betas=SOAP_BETAS, precondition_frequency=SOAP_FREQUENCY)]
        if rest:
            optimizers.append(_adamw(rest, betas))
    elif name == "adamw":
        optimizers = [_adamw(groups, betas)]
    else:
        raise ValueError(f"unknown optimizer {name!r}; use kalma, adamw, muon or soap")
    remember_peak_rates(optimizers)
    return optimizers


def _matrices_and_rest(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What an optimiser of matrices takes, and what AdamW takes beside it."""
    return [g for g in groups if g["method"] == "kalma"], [g for g in groups if g["method"] != "kalma"]


def _adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """torch's AdamW, in one operation a step where the device has it."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(plain_groups(groups), betas=betas, fused=devices <= {"cpu", "cuda"})


def keep_state(old: torch.optim.Optimizer, new: torch.optim.Optimizer, *, extends: bool = False) -> None:
    """Gives an optimiser what another one remembers of the parameters in its place, where their shapes are the same.

    Args:
        old: Of the former parameters.
        new: Of those in their place, some of which are larger.
        extends: Whether larger vectors are the former ones with zeros behind them, which goes for what is remembered
            of them too; else larger parameters begin anew.
    """
    parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in (old, new)]
    saved = old.state_dict()
    for index, (before, after) in enumerate(zip(*parameters, strict=True)):
        if before.shape == after.shape:
            continue
        of_one = saved["state"].pop(index, None)
        if extends and of_one is not None:
            saved["state"][index] = {name: _extended(value, before, after) for name, value in of_one.items()}
    if isinstance(old, Kalma):
        old.detach()
    new.load_state_dict(saved)


def _extended(value: Any, before: torch.Tensor, after: torch.Tensor) -> Any:
    if not isinstance(value, torch.Tensor) or value.shape != before.shape:
        return value
    return torch.cat((value, value.new_zeros(len(after) - len(before))))


def plain_groups(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What every optimiser of torch understands of groups: parameters, learning rate and decay."""
    return [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in groups]


def remember_peak_rates(optimizers: list[torch.optim.Optimizer]) -> None:
    """Keeps every group's rate as its peak, which :func:`scale_learning_rates` multiplies."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]


def scale_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Sets every group's rate to ``factor`` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
