"""All factors of a compressed model trained together towards the dense model's predictions and hidden states."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kalmagrove.compression.calibration import loss_of
from kalmagrove.errors import UsageError
from kalmagrove.optim.build import build_optimizers, scale_learning_rates
from kalmagrove.precision import autocast
from kalmagrove.training.config import parse_count, parse_duration

LEARNING_RATE = 1e-3
HIDDEN_WEIGHT = 1.0
WARMUP = 0.05
EVALUATIONS = 10
GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class RefitLength:
    """How long: seconds or tokens, the other one being None."""

    seconds: float | None
    tokens: int | None


@dataclass(frozen=True)
class RefitResult:
    """Attributes:
    loss_before: Nats a token on the validation windows.
    loss_after: Of the weights that were kept; never more than before.
    tokens: That were trained on.
    seconds: That it took, evaluations included.
    """

    loss_before: float
    loss_after: float
    tokens: int
    seconds: float


def parse_refit(text: str) -> RefitLength:
    """A duration such as 10m (ten minutes), 90s or 1h30m, or a plain number of tokens such as 2000000 or 500k.

    Raises:
        UsageError: It is neither.
    """
    try:
        return RefitLength(parse_duration(text), None)
    except UsageError:
        pass
    try:
        tokens = parse_count(text)
    except UsageError:
        tokens = 0
    if tokens < 1:
        raise UsageError(f"--refit {text!r} is neither a duration (90s, 10m, 1h30m) nor tokens (2000000, 500k)")
    return RefitLength(None, tokens)


def refit(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    train: Tensor,
    valid: Tensor,
    length: RefitLength,
    *,
    batch_size: int,
    seed: int,
    precision: str,
    progress: Callable[[float], None] = lambda done: None,
) -> RefitResult:
    """Trains the layers of ``model`` by Kalma and leaves it with the weights that were best on ``valid``.

    The loss is the Kullback-Leibler divergence of the predictions from the dense model's, in nats a token, and the
    mean square of each layer's difference relative to the dense layer's power. Embeddings and the head stay as they
    are.

    Args:
        model: Compressed.
        dense: What it was.
        train: (windows, context + 1), read again and again in a seeded order.
        valid: (windows, context + 1).
        length: How long.
        batch_size: Windows of a step.
        seed: Of the order.
        precision: "bf16" or "fp32", of the products.
        progress: Called after each step with the part that is done.
    """
    began = time.monotonic()
    trained = _trained_parameters(model)
    best, best_loss = [parameter.detach().clone() for parameter in trained], loss_of(model, valid, precision)
    before = best_loss
    optimizers = build_optimizers("kalma", model, lr=LEARNING_RATE, auxiliary_lr=LEARNING_RATE, weight_decay=0.0)
    tokens, next_evaluation = 0, 1 / EVALUATIONS
    model.train()
    for batch in _batches(train[:, :-1], batch_size, seed):
        done = _part_done(length, time.monotonic() - began, tokens)
        scale_learning_rates(optimizers, min(1.0, done / WARMUP + 0.1) * (1 - done))
        loss = _distance(model, dense, batch.to(next(model.parameters()).device), precision)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += batch.numel()
        done = _part_done(length, time.monotonic() - began, tokens)
        progress(min(1.0, done))
        if done >= min(1.0, next_evaluation):
            next_evaluation = done + 1 / EVALUATIONS
            now = loss_of(model, valid, precision)
            if math.isfinite(now) and now < best_loss:
                best, best_loss = [parameter.detach().clone() for parameter in trained], now
        if done >= 1:
            break
    with torch.no_grad():
        for parameter, kept in zip(trained, best, strict=True):
            parameter.copy_(kept)
    for optimizer in optimizers:
        if hasattr(optimizer, "detach"):
            optimizer.detach()
    model.eval()
    model.requires_grad_(True)
    return RefitResult(before, best_loss, tokens, time.monotonic() - began)


def _trained_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    frozen = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    head = model.get_output_embeddings()
    frozen |= set() if head is None else {id(parameter) for parameter in head.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _distance(model: PreTrainedModel, dense: PreTrainedModel, tokens: Tensor, precision: str) -> Tensor:
    with autocast("bf16" if precision == "bf16" else "fp32", tokens.device):
        with torch.no_grad():
            wanted = dense(input_ids=tokens, output_hidden_states=True)
        found = model(input_ids=tokens, output_hidden_states=True)
    wanted_log, found_log = (output.logits.float().log_softmax(-1).flatten(0, 1) for output in (wanted, found))
    divergence = F.kl_div(found_log, wanted_log, reduction="batchmean", log_target=True)
    pairs = list(zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True))
    hidden = torch.stack([(f.float() - w.float()).square().mean() / w.float().square().mean() for f, w in pairs])
    return divergence + HIDDEN_WEIGHT * hidden.mean()


def _batches(windows: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for rows in order.split(min(batch_size, len(windows))):
            yield windows[rows]


def _part_done(length: RefitLength, seconds: float, tokens: int) -> float:
    if length.seconds is not None:
        return seconds / length.seconds
    return tokens / (length.tokens or 1)
