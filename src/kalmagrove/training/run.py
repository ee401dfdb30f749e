"""One model in training: its state, and a method that does one optimiser step."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from kalmagrove.data.batches import evaluation_windows
from kalmagrove.data.example_store import PackedExamples
from kalmagrove.data.training_data import TrainingData
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.evaluation.examples import score_examples
from kalmagrove.modalities.sequences import Sequences
from kalmagrove.models.accounting import build_empty
from kalmagrove.models.build import build_model, model_config
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.growing import grow_rank
from kalmagrove.models.scoring import nats_of_windows
from kalmagrove.optim.build import build_optimizers, keep_state, scale_learning_rates
from kalmagrove.optim.distributed import whole_tensor
from kalmagrove.optim.kalma import Kalma
from kalmagrove.optim.schedules import learning_rate_factor
from kalmagrove.precision import autocast, choose_device, choose_precision, synchronize
from kalmagrove.training.checkpoint import Checkpoint, naming_checkpoint
from kalmagrove.training.config import TrainConfig
from kalmagrove.training.extras import require_extra
from kalmagrove.training.measures import gradient_noise_scale, matrices_of, update_ratio
from kalmagrove.training.parallel import (
    ParallelLoss,
    check_compiler,
    check_processes,
    load_whole_model,
    load_whole_optimizer,
    whole_optimizer_state,
    whole_state,
)
from kalmagrove.world import ALONE, World

VALIDATION_TOKENS = 32768
"""Tokens of the validation split that are read while training goes on."""


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did.

    Attributes:
        loss: Mean nats a token of the batch, before the step.
        grad_norm: Norm of the gradient before clipping.
        lr: Learning rate of the first group.
        seconds: Wall time of the step, optimiser included.
        update_ratio: Change of the matrices relative to them; None where it was not asked for.
        gradient_noise_scale: In tokens; None where it was not asked for, or cannot be told from this batch.
    """

    loss: float
    grad_norm: float
    lr: float
    seconds: float
    update_ratio: float | None = None
    gradient_noise_scale: float | None = None


class TrainingDiverged(KalmaGroveError):
    """The loss is not a number any more."""


class TrainingRun:
    """A model, its optimisers and its place in the data.

    Args:
        config: Everything that the run depends on.
        data: The packed text or examples; the training split must hold one sequence.
        world: The processes that train together; each of them makes a run of its own.

    Attributes:
        step: Optimiser steps that are done.
        is_whole: Whether the parameters are those after this step: not while a step changes them.

    Raises:
        UsageError: The configuration does not fit the data, the machine or the number of processes.
    """

    def __init__(self, config: TrainConfig, data: TrainingData, world: World = ALONE) -> None:
        self.config, self.data, self.world = config, data, world
        loop = config.loop
        check_processes(loop, world)
        check_compiler(loop)
        try:
            self.device = choose_device(loop.device, local_rank=world.local_rank if world.size > 1 else None)
            self.precision = choose_precision(loop.precision, self.device)
        except ValueError as error:
            raise UsageError(f"loop: {error}") from error
        data.check_context(loop.context_length)
        self._make_model()
        if loop.activation_checkpointing:
            self.model.make_activations_again()
        self._check_growth()
        self._prepare_for_training()
        self.step, self.is_whole = 0, True

    def _make_model(self) -> None:
        """The model and its configuration, on the device."""
        loop, data = self.config.loop, self.data
        overrides = {
            **data.model_options(),
            "max_position_embeddings": loop.context_length,
            **self.config.model.overrides(),
        }
        token = data.end_of_text_id
        self.model_config = model_config(self.config.model.preset, overrides, bos_token_id=token, eos_token_id=token)
        try:
            self.model = build_model(self.model_config, loop.seed).to(self.device).train()
        except ValueError as error:
            raise UsageError(f"model: {error}") from error

    def _prepare_for_training(self) -> None:
        loop = self.config.loop
        # Too little text is an error here, before step 1.
        example = self.batch(0)[:1].to(self.device)
        if self.world.size > 1 and loop.parallel == "fsdp" and isinstance(self.data, PackedExamples):
            raise UsageError(f"loop.parallel fsdp is for text; train {self.data.modality} data with loop.parallel ddp")
        self.loss = ParallelLoss(self.model, self.world, loop.parallel, compiled=loop.compile, example=example)
        self.optimizers = self._build_optimizers()

    def _build_optimizers(self) -> list[torch.optim.Optimizer]:
        optim = self.config.optim
        if optim.name == "soap":
            require_extra("pytorch_optimizer", "soap", "optim.name soap")
            if self.loss.sharded:
                raise UsageError("optim.name soap needs whole matrices; train it with loop.parallel ddp")
        return build_optimizers(
            optim.name,
            self.model,
            **optim.peak_rates(),
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            damping=optim.damping,
            refresh_every=optim.refresh_every,
            betas=(optim.beta1, optim.beta2),
            divide_work=self.world.size > 1,
        )

    def _check_growth(self) -> None:
        """Tries the planned growth on a model without weights, so that a wrong rank is an error before step 1."""
        trial = build_empty(copy.deepcopy(self.model_config))
        for step, rank in self._growth():
            try:
                grow_rank(trial, rank, seed=0)
            except ValueError as error:
                raise UsageError(f"loop.grow_rank, step {step}: {error}") from error

    def _growth(self) -> list[tuple[int, int]]:
        """(step, rank) in the order of the steps."""
        return sorted((self.config.loop.grow_rank or {}).items())

    def _grow_where_planned(self) -> None:
        """What the model gains before this step."""
        planned = self.config.loop.grow_rank
        if planned and self.step in planned:
            self._grow(self.step, planned[self.step])

    def _grow(self, step: int, rank: int) -> None:
        """A larger rank; parameters of unchanged shape keep their optimiser state."""
        grow_rank(self.model, rank, seed=self.config.loop.seed + step)
        former = self.optimizers
        self._prepare_for_training()
        for old, new in zip(former, self.optimizers, strict=True):
            keep_state(old, new)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.loop.total_steps

    @property
    def done(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.total_steps

    def batch(self, step: int) -> torch.Tensor | Sequences:
        """This process's part of the tokens of a step, (sequences, context + 1)."""
        loop, world = self.config.loop, self.world
        first, end = (loop.batch_size * place // world.size for place in (world.rank, world.rank + 1))
        return self.data.batch(
            "train",
            context_length=loop.context_length,
            batch_size=loop.batch_size,
            seed=loop.seed,
            step=step,
            rows=range(first, end),
        )

    def measured_step(self) -> StepResult:
        """One optimiser step with its update ratio and gradient noise scale; the same step as without.

        Raises:
            TrainingDiverged: As for `train_step`.
        """
        before = [matrix.clone() for matrix in matrices_of(self.model)]
        noise_scale = self._noise_scale()
        result = self.train_step()
        after = matrices_of(self.model)
        grown = len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True))
        ratio = None if grown else update_ratio(before, after)
        return replace(result, update_ratio=ratio, gradient_noise_scale=noise_scale)

    def _noise_scale(self) -> float | None:
        def loss_sum(part: torch.Tensor | Sequences) -> torch.Tensor:
            with autocast(self.precision, self.device):
                return self.model.token_loss_sum(part[:, :-1], part[:, 1:])

        tokens = self.batch(self.step)[: self.config.loop.micro_batch_size].to(self.device)
        if len(tokens) < 2:
            return None
        self._set_hooks(False)
        try:
            return gradient_noise_scale(list(self.model.parameters()), tokens, loss_sum)
        finally:
            self._set_hooks(True)

    def train_step(self) -> StepResult:
        """One optimiser step.

        Raises:
            TrainingDiverged: The loss or the gradient is not finite; the parameters are as before the step.
        """
        loop, optim = self.config.loop, self.config.optim
        synchronize(self.device)
        started = time.perf_counter()
        self._grow_where_planned()
        factor = learning_rate_factor(
            optim.schedule, self.step, self.total_steps, round(optim.warmup_part * self.total_steps)
        )
        scale_learning_rates(self.optimizers, factor)
        tokens = self.batch(self.step).to(self.device)
        loss = self._accumulate(tokens, loop.micro_batch_size or loop.batch_size)
        limit = optim.grad_clip if optim.grad_clip > 0 else math.inf
        grad_norm = float(whole_tensor(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)))
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            self.model.zero_grad(set_to_none=True)
            what = f"the norm of the gradient is {grad_norm}" if math.isfinite(loss) else f"the loss is {loss}"
            raise TrainingDiverged(
                f"{what} at step {self.step + 1}; lower optim.lr or optim.lr_scale, or use loop.precision fp32"
            )
        self.is_whole = False
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step, self.is_whole = self.step + 1, True
        lr = self.optimizers[0].param_groups[0]["lr"]
        synchronize(self.device)
        return StepResult(loss, grad_norm, lr, time.perf_counter() - started)

    def _accumulate(self, tokens: torch.Tensor | Sequences, micro_batch_size: int) -> float:
        """Gradients of the mean loss over the whole batch, however it is cut; returns that mean."""
        count = self._predicted_tokens(tokens)
        total = 0.0
        is_watched = any(isinstance(optimizer, Kalma) and optimizer.looks_next for optimizer in self.optimizers)
        if self.config.loop.compile:
            self._set_hooks(is_watched)
        parts = tokens.split(micro_batch_size)
        for number, part in enumerate(parts, start=1):
            with self.loss.without_averaging(last=number == len(parts)):
                with autocast(self.precision, self.device):
                    nats = self.loss.compute(part[:, :-1], part[:, 1:], is_watched=is_watched)
                # Gradients are averaged over the processes, and this mean is over all of their tokens.
                (nats * (self.world.size / count)).backward()
            total += float(nats.detach())
        return self.world.sum([total], self.device)[0] / count

    def _predicted_tokens(self, tokens: torch.Tensor | Sequences) -> float:
        """Tokens of the whole batch, over all processes, that the mean loss is over."""
        if isinstance(tokens, torch.Tensor):
            return self.config.loop.tokens_per_step
        return max(1.0, self.world.sum([tokens[:, 1:].numel()], self.device)[0])

    def _set_hooks(self, on: bool) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, Kalma):
                optimizer.set_hooks(on)

    def validation_loss(self) -> float:
        """Mean nats a token over the first part of the validation split, or of all where it is small."""
        if isinstance(self.data, PackedExamples):
            terms: dict[str, Any] = {"device": self.device, "precision": self.precision, "world": self.world}
            most = max(1, VALIDATION_TOKENS // self.data.longest)
            return score_examples(self.model, self.data, "valid", most=most, **terms).loss
        tokens = self.data.tokens("valid")[: VALIDATION_TOKENS + 1]
        length = self.config.loop.context_length
        nats, count = nats_of_windows(
            self.model,
            evaluation_windows(tokens, context_length=length, stride=length),
            vocab_size=self.model_config.vocab_size,
            device=self.device,
            precision=self.precision,
            world=self.world,
        )
        return nats / max(1, count)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: ``model``, ``optimizer`` and ``progress``; all processes ask for it together."""
        return {
            "model": whole_state(self.model.state_dict()),
            "optimizer": {"optimizers": [whole_optimizer_state(optimizer) for optimizer in self.optimizers]},
            "progress": {
                "step": self.step,
                "tokens": self.step * self.config.loop.tokens_per_step,
                "data_fingerprint": self.data.fingerprint,
            },
        }

    def whole_model(self) -> KalmaGroveForCausalLM:
        """The model with all of its parameters; all processes must ask for it together."""
        if not self.loss.sharded:
            return self.model
        state = whole_state(self.model.state_dict())
        model = build_model(copy.deepcopy(self.model_config), self.config.loop.seed)
        model.load_state_dict(state)
        return model

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint.

        Raises:
            KalmaGroveError: The checkpoint was made with other data, or for another model.
        """
        with naming_checkpoint(checkpoint.path):
            self._restore(checkpoint)

    def _restore(self, checkpoint: Checkpoint) -> None:
        if checkpoint.progress["data_fingerprint"] != self.data.fingerprint:
            raise KalmaGroveError(
                f"{checkpoint.path} was trained on other data; give the same data, or start a new run folder"
            )
        for step, rank in self._growth():
            if step < int(checkpoint.progress["step"]):
                self._grow(step, rank)
        load_whole_model(self.model, checkpoint.model)
        for optimizer, state in zip(self.optimizers, checkpoint.optimizer["optimizers"], strict=True):
            load_whole_optimizer(optimizer, state)
        self.step = int(checkpoint.progress["step"])
