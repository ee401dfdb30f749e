"""The report of a comparison: one page that needs nothing else, and the table as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kalmagrove.files import write_text_atomic
from kalmagrove.report.figures import line_colour, loss_chart, ratio_chart
from kalmagrove.report.results import Environment, Model, Results
from kalmagrove.report.table import build_table, format_bytes, format_count, to_markdown, tokens_a_parameter
from kalmagrove.report.verdict import verdict
from kalmagrove.report.wording import wording_of

TEMPLATE = "page.html.jinja"
DEFAULT = "default"
"""Shown for a configuration key that only other models set."""


@dataclass(frozen=True)
class Difference:
    """A configuration key that is not the same in all models, with each model's value."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class TriedRate:
    """One factor on the learning rates: each model's validation loss, and whether the model kept the factor."""

    lr_scale: str
    losses: tuple[str, ...]
    chosen: tuple[bool, ...]


def write_report(results: Results, folder: Path) -> list[Path]:
    """Writes ``report.html`` and ``table.md``; the same results give the same bytes.

    Args:
        results: A comparison, finished or not.
        folder: Must exist.

    Returns:
        The two files.

    Raises:
        OSError: A file cannot be written.
    """
    texts = {"report.html": render_page(results), "table.md": to_markdown(build_table(results))}
    for name, text in texts.items():
        write_text_atomic(folder / name, text)
    return [folder / name for name in texts]


def render_page(results: Results) -> str:
    """The page as text."""
    from jinja2 import Environment as Templates
    from jinja2 import PackageLoader, StrictUndefined

    templates = Templates(
        loader=PackageLoader("kalmagrove.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"count": format_count, "times": _with_times_signs}
    return templates.get_template(TEMPLATE).render(
        results=results,
        wording=wording_of(results.data.modality),
        verdict=verdict(results),
        table=build_table(results),
        colours={model.name: line_colour(results, model.name) for model in results.models},
        ratio_chart=ratio_chart(results),
        loss_charts=[chart for chart in _loss_charts(results) if chart],
        has_valid_curve=any(run.valid_curve.tokens for model in results.models for run in model.runs),
        differences=differences(results.models),
        tried_rates=tried_rates(results),
        tried_auxiliary_rates=tried_auxiliary_rates(results),
        environment=describe_environment(results.environment),
        tokens_a_parameter=tokens_a_parameter(results),
    )


def differences(models: tuple[Model, ...]) -> list[Difference]:
    """The configuration keys in which the models differ, those of the model first, in the order they come."""
    chosen = [
        {"preset": m.preset, "optimiser": m.optim, "precision": m.precision, "learning-rate factor": m.lr_scale}
        for m in models
    ]
    found = _differing("", chosen) + _differing("", [m.model_config for m in models])
    return found + _differing("optim.", [{k: v for k, v in m.optim_config.items() if k != "name"} for m in models])


def tried_rates(results: Results) -> list[TriedRate]:
    """One row for each factor that any model tried, at full length where that was done; empty if nothing was tuned."""
    tried = {model.name: {t.lr_scale: t.valid_loss for t in results.rates_tried(model)} for model in results.models}
    return _rows_of_trials(tried, {model.name: model.lr_scale for model in results.models})


def tried_auxiliary_rates(results: Results) -> list[TriedRate]:
    """The same of the rate of embeddings, head and vectors."""
    if not results.auxiliary_trials:
        return []
    tried = {of.model: {t.auxiliary_scale: t.valid_loss for t in of.trials} for of in results.auxiliary_trials}
    kept = {model.name: model.auxiliary_scale for model in results.models}
    return _rows_of_trials({name: tried.get(name, {}) for name in kept}, kept)


def _rows_of_trials(tried: Mapping[str, Mapping[float, float | None]], kept: Mapping[str, float]) -> list[TriedRate]:
    rows = []
    for scale in sorted({scale for losses in tried.values() for scale in losses}):
        chosen = tuple(bool(losses) and kept[name] == scale for name, losses in tried.items())
        rows.append(TriedRate(f"{scale:g}", tuple(_tried(losses, scale) for losses in tried.values()), chosen))
    return rows


def _tried(losses: Mapping[float, float | None], scale: float) -> str:
    if scale not in losses:
        return "not tried"
    loss = losses[scale]
    return "diverged" if loss is None else f"{loss:.3f}"


def _loss_charts(results: Results) -> list[str]:
    """Against tokens, and against seconds where they are known."""
    is_timed = not results.side_by_side or results.timing_environment is not None
    return [loss_chart(results, "tokens"), *([loss_chart(results, "seconds")] if is_timed else [])]


def describe_environment(environment: Environment) -> list[tuple[str, str]]:
    """Names and values of what is known of the machine."""
    packages = environment.packages or {}
    known: list[tuple[str, str | None]] = [
        ("Processor", environment.cpu),
        ("Usable cores", _text(environment.usable_cores)),
        ("Threads of torch", _text(environment.torch_threads)),
        ("Memory", None if environment.memory_bytes is None else format_bytes(environment.memory_bytes)),
        ("GPUs", ", ".join(environment.gpus) or "none"),
        ("CUDA of torch", environment.cuda),
        ("System", environment.platform),
        ("Python", environment.python),
        ("Packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version) or None),
        ("Source files", environment.source),
    ]
    return [(name, value) for name, value in known if value is not None]


def _differing(prefix: str, configs: list[dict[str, object]] | list[Mapping[str, object]]) -> list[Difference]:
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = [Difference(prefix + key, tuple(_value(config.get(key, DEFAULT)) for config in configs)) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def _value(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(value: int | None) -> str | None:
    return None if value is None else str(value)


def _with_times_signs(sentence: str) -> str:
    return re.sub(r"(?<=\d)x(?= its )", "\u00d7", sentence)
