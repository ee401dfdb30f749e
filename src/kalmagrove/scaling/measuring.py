"""The model of a plan's answer, built as the sweep built its own, and its speed on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kalmagrove.errors import UsageError
from kalmagrove.models.build import build_model, model_config
from kalmagrove.optim.build import build_optimizers
from kalmagrove.precision import autocast, choose_device, choose_precision, synchronize
from kalmagrove.scaling.costs import MEASURED_STEPS, WARMUP_STEPS
from kalmagrove.scaling.ladder import Family, Rung, SweepConfig
from kalmagrove.scaling.plan import Answer
from kalmagrove.training.config import ModelConfig, OptimConfig

MOST_PARAMETERS = 3e9


def model_of(answer: Answer, models: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family's optimiser and the model's configuration."""
    known = models["families"][answer.family.name]
    config = SweepConfig(
        families=f"{known['preset']}+{known['optim']}", sizes=[answer.model.size], head_dim=int(models["head_dim"])
    )
    member = config.family_list()[0]
    return member, config.model(Rung(member, answer.model.size, 0, answer.model.rank_ratio, 0, 1.0))


def measured_flops_per_second(
    answer: Answer, models: Mapping[str, Any] | None, *, say: Callable[[str], None] = lambda _: None
) -> float:
    """FLOPs a second of training steps of an answer's model on this machine, on tokens drawn at random.

    Args:
        answer: Whose model is built.
        models: How the sweep built its models.
        say: Told what is being measured.

    Raises:
        UsageError: The model is not known, or too large to be tried.
    """
    if models is None:
        raise UsageError("--measure needs the fit of a sweep, which says how its models were built")
    if answer.model.parameters > MOST_PARAMETERS:
        size = f"a model of {answer.model.parameters:.3g} parameters"
        raise UsageError(f"{size} is too large to be tried here; give --flops_per_second in the place of --measure")
    say(f"measuring a few steps of {answer.family.name} {answer.model.size}")
    member, model_options = model_of(answer, models)
    length, tokens_per_step = int(models["context_length"]), int(models["tokens_per_step"])
    sizes = {"vocab_size": int(models["vocab_size"]), "max_position_embeddings": length}
    device = choose_device("auto")
    precision = choose_precision("auto", device)
    model = build_model(model_config(model_options.preset, sizes | model_options.overrides()), 0).to(device).train()
    optimizers = build_optimizers(member.optim, model, **OptimConfig(name=member.optim).peak_rates())
    shape = (max(1, tokens_per_step // length), length + 1)
    tokens = torch.randint(sizes["vocab_size"], shape, generator=torch.Generator().manual_seed(0)).to(device)
    seconds = []
    for _ in range(WARMUP_STEPS + MEASURED_STEPS):
        synchronize(device)
        started = time.perf_counter()
        with autocast(precision, device):
            loss = model.token_loss_sum(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    per_step = answer.model.flops_per_token * tokens[:, 1:].numel()
    return per_step / statistics.fmean(seconds[WARMUP_STEPS:])
