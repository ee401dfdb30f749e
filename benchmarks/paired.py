"""Steps of several models or optimisers in turns, in one process: a noisy machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kalmagrove.precision import autocast, synchronize
from kalmagrove.training.environment import keep_freed_memory

WARMUP_ROUNDS = 3


@dataclass
class Contestant:
    """A model in training.

    Attributes:
        model: In training mode, on its device.
        optimizers: Of the model.
        precision: Of the forward.
        loss: Mean loss of the model on tokens (batch, context + 1).
    """

    model: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    precision: Literal["bf16", "fp32"]
    loss: Callable[[nn.Module, Tensor], Tensor]

    def step(self, tokens: Tensor) -> tuple[float, float]:
        """Seconds of forward, backward, clipping and optimiser on ``tokens``, and of the optimiser alone."""
        device = next(self.model.parameters()).device
        tokens = tokens.to(device)
        started = _now(device)
        self.backward(tokens)
        before = _now(device)
        self.update()
        ended = _now(device)
        return ended - started, ended - before

    def backward(self, tokens: Tensor) -> None:
        """Clipped gradients of the loss on ``tokens``, which are on the model's device."""
        with autocast(self.precision, tokens.device):
            loss = self.loss(self.model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def update(self) -> None:
        """The optimisers' step; the gradients are used up."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@dataclass
class Times:
    """Seconds of the measured rounds.

    Attributes:
        step: Of the whole steps.
        optimizer: Of the optimisers in them.
    """

    step: list[float]
    optimizer: list[float]


def own_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss of one of our models on tokens (batch, context + 1)."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss: Tensor = model.token_loss_sum(inputs, targets) / targets.numel()  # type: ignore[operator]
    return loss


def random_tokens(step: int, batch_size: int, context_length: int, vocab_size: int) -> Tensor:
    """A batch (batch, context + 1) of random tokens: speed does not depend on the text."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(vocab_size, (batch_size, context_length + 1), generator=generator)


def take_turns(
    contestants: Mapping[str, Contestant], rounds: int, batch_of: Callable[[int], Tensor], *, keep_memory: bool = True
) -> dict[str, Times]:
    """Times of all contestants, A, B, C, A, B, C, ..., after a few rounds that do not count."""
    if keep_memory:
        keep_freed_memory()
    times = {name: Times([], []) for name in contestants}
    for step in range(WARMUP_ROUNDS + rounds):
        tokens = batch_of(step)
        for name, contestant in contestants.items():
            whole, own = contestant.step(tokens)
            if step >= WARMUP_ROUNDS:
                times[name].step.append(whole)
                times[name].optimizer.append(own)
    return times


def median_ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Median over the rounds of the ratio of two contestants' times within a round."""
    return statistics.median(own / other for own, other in zip(times, reference, strict=True))


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()
