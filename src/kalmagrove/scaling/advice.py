"""The answers of a plan, with hours and memory, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kalmagrove.report.table import format_bytes, format_count
from kalmagrove.scaling.plan import Answer, FittedFamily, best_for_flops, budget_flops, cheapest_for_loss

_ROWS = (
    ("Model", "size"),
    ("Parameters", "parameters"),
    ("Rank", "rank_ratio"),
    ("Tokens", "tokens"),
    ("Tokens a parameter", "tokens_per_parameter"),
    ("Times through the text", "epochs"),
    ("Expected loss, nats a token (95 %)", "loss"),
    ("Expected perplexity", "perplexity"),
    ("FLOPs", "flops"),
    ("Hours", "hours"),
    ("Memory of a device", "memory_bytes"),
)


def advice(
    families: Sequence[FittedFamily],
    models: Mapping[str, Any] | None,
    *,
    flops: float | None = None,
    hours: float | None = None,
    loss: float | None = None,
    devices: int = 1,
    flops_per_second: float | None = None,
    unique_tokens: float | None = None,
    measure: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The best run of each family for one budget.

    Args:
        families: With their laws.
        models: How the sweep built its models; None where the fit was of a table.
        flops: Budget: of the whole training.
        hours: Budget: of the training, on all devices.
        loss: Instead of a budget: what is to be reached.
        devices: That train together.
        flops_per_second: Of a device; None takes that of a worker of the sweep.
        unique_tokens: Of the text.
        measure: Whether to time steps of the answers here, and to plan again with their speed.
        say: Told what is being measured.

    Raises:
        UsageError: Hours are asked for and no speed is known, or steps cannot be measured.
    """
    asked = {"flops": flops, "hours": hours, "loss": loss, "devices": devices, "unique_tokens": unique_tokens}
    found: dict[str, Any] = {"asked": {k: v for k, v in asked.items() if v is not None}, "families": {}}
    for family in families:

        def answered(member: FittedFamily) -> Answer | None:
            if loss is not None:
                return cheapest_for_loss(member, loss, models)
            budget = flops if flops is not None else budget_flops(member, hours or 0.0, devices, flops_per_second)
            return best_for_flops(member, budget, models, unique_tokens=unique_tokens)

        answer = answered(family)
        if measure and answer is not None:
            from kalmagrove.scaling.measuring import measured_flops_per_second

            speed = measured_flops_per_second(answer, models, say=say)
            family = replace(family, flops_per_second=speed)
            answer = answered(family)
        found["families"][family.name] = _described(
            family, answer, models, devices=devices, flops_per_second=flops_per_second, unique_tokens=unique_tokens
        )
    return found


def _described(
    family: FittedFamily,
    answer: Answer | None,
    models: Mapping[str, Any] | None,
    *,
    devices: int,
    flops_per_second: float | None,
    unique_tokens: float | None,
) -> dict[str, Any]:
    about = {"warnings": list(family.warnings)}
    if answer is None:
        return about | {"reached": False}
    speed = flops_per_second or family.flops_per_second
    return about | {
        "reached": True,
        "size": answer.model.size or None,
        "parameters": answer.model.parameters,
        "rank_ratio": answer.model.rank_ratio,
        "tokens": answer.tokens,
        "tokens_per_parameter": answer.tokens / answer.model.parameters,
        "epochs": None if unique_tokens is None else answer.tokens / unique_tokens,
        "loss": answer.loss,
        "loss_interval": list(answer.loss_interval),
        "perplexity": math.exp(answer.loss) if answer.loss < 700 else None,
        "flops": answer.flops,
        "flops_interval": None if answer.flops_interval is None else list(answer.flops_interval),
        "flops_per_second": speed,
        "hours": answer.flops / speed / devices / 3600 if speed else None,
        "memory_bytes": _memory(answer, models, devices),
        "flags": _flags(answer, models),
        "outside": list(answer.outside),
    }


def _memory(answer: Answer, models: Mapping[str, Any] | None, devices: int) -> int | None:
    """Bytes of a training step on each device; None for a model that is only a number of parameters."""
    if models is None:
        return None
    from kalmagrove.models.build import model_config
    from kalmagrove.models.training_memory import training_memory
    from kalmagrove.scaling.measuring import model_of

    member, model = model_of(answer, models)
    length = int(models["context_length"])
    options = {"vocab_size": int(models["vocab_size"]), "max_position_embeddings": length}
    config = model_config(model.preset, options | model.overrides())
    sequences = max(devices, int(models["tokens_per_step"]) // length)
    memory = training_memory(
        config,
        batch_size=sequences,
        context_length=length,
        optimizer=member.optim,
        precision="bf16",
        world_size=devices,
    )
    return memory.total


def _flags(answer: Answer, models: Mapping[str, Any] | None) -> str | None:
    """What ``kalmagrove train`` needs to build the model."""
    if models is None:
        return None
    from kalmagrove.scaling.measuring import model_of

    member, model = model_of(answer, models)
    options = " ".join(f"--model.{name} {value}" for name, value in model.overrides().items())
    return f"--preset {model.preset} --optim.name {member.optim} {options} --tokens {int(answer.tokens)}"


def markdown_of_advice(found: Mapping[str, Any]) -> str:
    """The answers beside each other, with what a reader must know before trusting them."""
    families: Mapping[str, Any] = found["families"]
    reached = {name: family for name, family in families.items() if family["reached"]}
    lines = []
    if reached:
        lines += [f"| | {' | '.join(reached)} |", f"| :-- | {' | '.join('--:' for _ in reached)} |"]
        for label, key in _ROWS:
            cells = [_cell(key, family) for family in reached.values()]
            if any(cell != "-" for cell in cells):
                lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    for name, family in families.items():
        if not family["reached"]:
            lines.append(f"{name}: no run of any size has this loss, by its law.")
            continue
        place = "; ".join(family["outside"]) or "within the fitted runs"
        lines.append(f"{name}: {place}.")
        if family["outside"]:
            lines[-1] += " This is an extrapolation, and its interval knows nothing of a law that bends."
        lines += [f"  careful: {warning}" for warning in family["warnings"]]
        if family["flags"]:
            lines.append(f"  kalmagrove train {family['flags']} --out runs/{name}")
    if "loss" in found["asked"] and len(reached) > 1:
        first, *others = reached
        for name in others:
            ratio = reached[name]["flops"] / reached[first]["flops"]
            lines.append(f"{name} needs {ratio:.3g}x of the FLOPs of {first}.")
    return "\n".join(lines)


def _cell(key: str, family: Mapping[str, Any]) -> str:
    value = family[key]
    if value is None:
        return "-"
    if key == "size":
        return str(value)
    if key == "loss":
        low, high = family["loss_interval"]
        return f"{value:.3f} ({low:.3f}-{high:.3f})"
    if key == "flops":
        within = family["flops_interval"]
        return f"{value:.3g}" + ("" if within is None else f" ({within[0]:.3g}-{within[1]:.3g})")
    if key == "rank_ratio":
        return "-" if value == 1 else f"{value:g}"
    if key == "memory_bytes":
        return format_bytes(value)
    if key in ("parameters", "tokens"):
        return format_count(value)
    return f"{value:.3g}" if key != "perplexity" else f"{value:.2f}"
