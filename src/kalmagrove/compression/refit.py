"""All factors of a compressed model trained together towards the dense model's predictions and hidden states."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from kalmagrove.compression.calibration import loss_of
from kalmagrove.errors import UsageError
from kalmagrove.files import remove
from kalmagrove.optim.build import build_optimizers, scale_learning_rates
from kalmagrove.optim.groups import embeddings_of
from kalmagrove.optim.kalma import Kalma
from kalmagrove.precision import Precision, autocast
from kalmagrove.quantities import parse_count, parse_duration
from kalmagrove.training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    naming_checkpoint,
    save_checkpoint,
)

LEARNING_RATE = 1e-3
HIDDEN_WEIGHT = 1.0
WARMUP = 0.05
EVALUATIONS = 10
SAVE_EVERY = 600.0
"""Seconds; a machine that is taken away more often than the validation windows are looked at loses no more."""
GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class RefitLength:
    """How long: seconds or tokens, the other one being None."""

    seconds: float | None
    tokens: int | None


@dataclass(frozen=True)
class RefitResult:
    """What a refit changed.

    Attributes:
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
    seconds, tokens = 0.0, 0
    with suppress(UsageError):
        seconds = parse_duration(text)
    if seconds > 0:
        return RefitLength(seconds, None)
    with suppress(UsageError):
        tokens = parse_count(text)
    if tokens < 1:
        raise UsageError(f"--refit {text!r} is neither a duration (90s, 10m, 1h30m) nor tokens (2000000, 500k)")
    return RefitLength(None, tokens)


@dataclass
class _State:
    """Where a refit stands.

    Attributes:
        terms: What it depends on beside the texts: length, batch size, seed and the weights that it began with.
        loss_before: Nats a token on the validation windows.
        best: The weights of the least loss so far.
        best_loss: Their loss.
        steps: Done.
        tokens: Trained on.
        seconds: Spent.
        next_evaluation: The part of the whole at which the validation windows are looked at again.
    """

    terms: dict[str, Any]
    loss_before: float
    best: list[Tensor]
    best_loss: float
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    next_evaluation: float = 1 / EVALUATIONS


@dataclass(frozen=True)
class _Run:
    """A refit under way.

    Attributes:
        model: Compressed.
        dense: What it was.
        valid: Windows that tell which weights are best, (windows, context + 1).
        length: How long.
        precision: Of the products.
        trained: The model's parameters that are trained.
        kalma: Trains them.
        state: Where it stands.
        began: When it would have begun had it never been cut off, by the monotonic clock.
    """

    model: PreTrainedModel
    dense: PreTrainedModel
    valid: Tensor
    length: RefitLength
    precision: Precision
    trained: list[nn.Parameter]
    kalma: Kalma
    state: _State
    began: float

    @property
    def part_done(self) -> float:
        """1 at the end or a little more."""
        if self.length.seconds is not None:
            return self.state.seconds / self.length.seconds
        return self.state.tokens / (self.length.tokens or 1)

    def step(self, tokens: Tensor) -> None:
        """One step on windows of tokens (windows, context)."""
        done, state = self.part_done, self.state
        scale_learning_rates([self.kalma], min(1.0, done / WARMUP + 0.1) * (1 - done))
        _distance(self.model, self.dense, tokens.to(self.trained[0].device), self.precision).backward()
        nn.utils.clip_grad_norm_(self.trained, GRADIENT_NORM)
        self.kalma.step()
        self.kalma.zero_grad()
        state.steps, state.tokens, state.seconds = state.steps + 1, state.tokens + tokens.numel(), _since(self.began)

    def look_at_valid(self) -> None:
        """Keeps the weights where none before had less loss."""
        state = self.state
        state.next_evaluation = self.part_done + 1 / EVALUATIONS
        loss = loss_of(self.model, self.valid, self.precision)
        if math.isfinite(loss) and loss < state.best_loss:
            state.best, state.best_loss = _copies(self.trained), loss
        state.seconds = _since(self.began)

    @torch.no_grad()
    def take_best(self) -> None:
        """Gives the model the weights of the least loss."""
        for parameter, best in zip(self.trained, self.state.best, strict=True):
            parameter.copy_(best)


def refit(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    train: Tensor,
    valid: Tensor,
    length: RefitLength,
    *,
    batch_size: int,
    seed: int,
    precision: Precision,
    folder: Path | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> RefitResult:
    """Trains the layers of ``model`` by Kalma and leaves it with the weights that were best on ``valid``.

    The loss is the Kullback-Leibler divergence of the predictions from the dense model's, in nats a token, and the
    mean square of each layer's difference relative to the dense layer's power. Embeddings, those of
    positions too, and the head stay as they are.

    Args:
        model: Compressed.
        dense: What it was.
        train: (windows, context + 1), read again and again in a seeded order.
        valid: (windows, context + 1).
        length: How long.
        batch_size: Windows of a step.
        seed: Of the order.
        precision: "bf16" or "fp32", of the products.
        folder: Keeps what is done, at each look at ``valid`` and every ten minutes; the same call goes on from there,
            one of another length, batch size, seed or start begins anew.
        progress: Called after each step with the part that is done.

    Raises:
        CheckpointError: All that the folder keeps is damaged.
        OSError: The folder cannot be written.
    """
    trained, kalma = _trained_parameters(model), _kalma_of(model)
    terms = {"length": asdict(length), "batch_size": batch_size, "seed": seed, "start": _digest(model)}
    state = None if folder is None else _kept_state(folder, terms, trained, kalma)
    if state is None:
        loss = loss_of(model, valid, precision)
        state = _State(terms, loss, _copies(trained), loss)
    run = _Run(model, dense, valid, length, precision, trained, kalma, state, time.monotonic() - state.seconds)
    saved_at = time.monotonic()
    _turn_dropout_off(model)
    model.train()
    for batch in itertools.islice(_batches(train[:, :-1], batch_size, seed), state.steps, None):
        if run.part_done >= 1:
            break
        run.step(batch)
        progress(min(1.0, run.part_done))
        is_looked_at = run.part_done >= min(1.0, state.next_evaluation)
        if is_looked_at:
            run.look_at_valid()
        if folder is not None and (is_looked_at or _since(saved_at) >= SAVE_EVERY):
            _keep_state(folder, state, trained, kalma)
            saved_at = time.monotonic()
    run.take_best()
    kalma.detach()
    model.eval()
    model.requires_grad_(True)
    return RefitResult(state.loss_before, state.best_loss, state.tokens, state.seconds)


def _kalma_of(model: PreTrainedModel) -> Kalma:
    (kalma,) = build_optimizers("kalma", model, lr=LEARNING_RATE, auxiliary_lr=LEARNING_RATE, weight_decay=0.0)
    assert isinstance(kalma, Kalma)
    return kalma


def _copies(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _turn_dropout_off(model: PreTrainedModel) -> None:
    """Nothing that a refit does is drawn but the order of its windows, so that one that was cut off can be repeated."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _digest(model: PreTrainedModel) -> str:
    """SHA-256 of all weights and buffers."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _since(began: float) -> float:
    return time.monotonic() - began


def _keep_state(folder: Path, state: _State, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    weights = {"now": [parameter.detach() for parameter in trained], "best": state.best}
    save_checkpoint(
        folder,
        step=state.steps,
        model={f"{kind}.{number}": own for kind, all_of in weights.items() for number, own in enumerate(all_of)},
        optimizer=optimizer.state_dict(),
        progress={field.name: getattr(state, field.name) for field in fields(state) if field.name != "best"},
        keep_last=2,
    )


def _kept_state(
    folder: Path, terms: Mapping[str, Any], trained: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> _State | None:
    """Puts a refit's kept weights and what its optimiser remembers in their places; None where there is no such one."""
    checkpoint, damaged = latest_checkpoint(folder)
    if checkpoint is None:
        if damaged:
            raise CheckpointError(folder, f"none of its checkpoints is whole ({damaged[0]}); remove it to begin anew")
        return None
    with naming_checkpoint(checkpoint.path):
        if checkpoint.progress["terms"] != terms:
            remove(folder)
            return None
        with torch.no_grad():
            for number, parameter in enumerate(trained):
                parameter.copy_(checkpoint.model[f"now.{number}"])
        optimizer.load_state_dict(checkpoint.optimizer)
        best = [checkpoint.model[f"best.{number}"].to(parameter.device) for number, parameter in enumerate(trained)]
        return _State(best=best, **checkpoint.progress)


def _trained_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    frozen = {id(table) for table in embeddings_of(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _distance(model: PreTrainedModel, dense: PreTrainedModel, tokens: Tensor, precision: Precision) -> Tensor:
    with autocast(precision, tokens.device):
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
