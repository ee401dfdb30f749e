"""The optimisers that are compared: settings chosen for each on one run of llama-1.7m-2k, and four learning rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from kalmagrove.optim.build import build_optimizers

Optimizers = list[torch.optim.Optimizer]

# Tried for the rivals: 1e-2 and 2e-2 for embeddings, head and vectors, momentum 0.9 and 0.95. SOAP's basis follows at
# every third step, as Kalma's does.
AUXILIARY_LR = 2e-2
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Method:
    """An optimiser of a whole model.

    Attributes:
        build: Makes it for a model and a learning rate.
        learning_rates: The trials; every method has the same number.
        warmup: Part of the run over which the learning rate rises.
    """

    build: Callable[[nn.Module, float], Optimizers]
    learning_rates: tuple[float, ...]
    warmup: float = 0.02


def adamw(model: nn.Module, lr: float) -> Optimizers:
    """AdamW for everything; embeddings, head and vectors have a rate of their own, as beside the other optimisers."""
    return build_optimizers("adamw", model, lr=lr, auxiliary_lr=AUXILIARY_LR, betas=BETAS)


def muon(model: nn.Module, lr: float) -> Optimizers:
    """``torch.optim.Muon`` for the matrices, AdamW for the rest."""
    return build_optimizers("muon", model, lr=lr, auxiliary_lr=AUXILIARY_LR, betas=BETAS, momentum=0.9)


def kalma(model: nn.Module, lr: float) -> Optimizers:
    """Kalma as it comes, attached."""
    return build_optimizers("kalma", model, lr=lr)


def soap(model: nn.Module, lr: float) -> Optimizers:
    """SOAP of pytorch-optimizer for the matrices, AdamW for the rest.

    Raises:
        ModuleNotFoundError: The benchmark extra is not installed.
    """
    return build_optimizers("soap", model, lr=lr, auxiliary_lr=AUXILIARY_LR, betas=BETAS)


METHODS = {
    "adamw": Method(adamw, (4e-4, 7.5e-4, 1.5e-3, 3e-3), warmup=0.1),
    "muon": Method(muon, (2.5e-3, 5e-3, 1e-2, 2e-2)),
    "soap": Method(soap, (1.5e-3, 3e-3, 6e-3, 1.2e-2), warmup=0.1),
    "kalma": Method(kalma, (1.5e-3, 3e-3, 6e-3, 1.2e-2), warmup=0.1),
}
