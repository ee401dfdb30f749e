"""``claims.md`` and ``claims.json``: the paper's table beside ours, and every claim with its verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kalmagrove.files import write_json_atomic, write_text_atomic
from kalmagrove.report.results import Environment, Metric, Model, Results, Split
from kalmagrove.report.statistics import median_spread, ratio_interval
from kalmagrove.report.table import build_table, format_count, format_score, to_markdown
from kalmagrove.reproduction.answers import Answer, shown
from kalmagrove.reproduction.claims import answer_claims
from kalmagrove.reproduction.evidence import Evidence, Study, mean_of
from kalmagrove.reproduction.headline import headline
from kalmagrove.reproduction.origin import Origin
from kalmagrove.reproduction.pairs import PAPER, Pair, PaperRow, pair_in, pairs_of
from kalmagrove.reproduction.plan import LADDER, LONG_CONTEXT, STUDIES

VERDICTS = ("supported", "not supported", "undecided", "not measured")


def write_page(origin: Origin, evidence: Evidence, folder: Path) -> list[Answer]:
    """Writes ``claims.md`` and ``claims.json``; returns the answers that they hold."""
    answers = answer_claims(evidence)
    record: dict[str, Any] = {"format": 1, "scale": origin.scale, "command": origin.command}
    write_json_atomic(folder / "claims.json", record | {"claims": [asdict(answer) for answer in answers]})
    write_text_atomic(folder / "claims.md", page(origin, evidence, answers))
    return answers


def page(origin: Origin, evidence: Evidence, answers: list[Answer]) -> str:
    """The page as Markdown."""
    parts = [
        "# The paper's claims, measured",
        "\n".join(f"- {headline(pair)}" for pair in _shown_pairs(evidence)),
        f"    {origin.command}",
        _summary(origin, evidence, answers),
        "## Table 1",
        _table_1(evidence),
        "## The fourteen claims",
        _claims(answers),
        *_studies(origin, evidence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown_pairs(evidence: Evidence) -> list[Pair]:
    """Table 1's and, for what a longer context changes, that of the study of it."""
    found = [*pairs_of(evidence).values(), pair_in(evidence, LONG_CONTEXT)]
    return [pair for pair in found if pair is not None]


def _summary(origin: Origin, evidence: Evidence, answers: list[Answer]) -> str:
    counted = ", ".join(
        f"{sum(answer.verdict == verdict for answer in answers)} {verdict}"
        for verdict in VERDICTS
        if any(answer.verdict == verdict for answer in answers)
    )
    missing = [
        name for name in origin.studies if name not in evidence.studies and not (name == LADDER and evidence.laws)
    ]
    lines = [
        "Targets are the package's own, the claims the paper's; ratios of parameters and of time meet a target as they "
        "are shown, to two places.",
        f"Of fourteen claims: {counted}. Scale `{origin.scale}`, and no further than that.",
    ]
    if pair_in(evidence, LONG_CONTEXT) is not None:
        lines.append(f"What is said of Table 1's models is answered from {' and '.join(PAPER)} alone.")
    if missing:
        lines.append(f"Not begun: {', '.join(missing)}.")
    unfinished = [study.name for study in evidence.studies.values() if not _is_finished(study.results)]
    if unfinished:
        lines.append(f"Not finished: {', '.join(unfinished)}.")
    short = [study.name for study in evidence.studies.values() if study.results.screening]
    if short:
        lines.append(f"Screening, with fewer than 20 training tokens a parameter: {', '.join(short)}.")
    return " ".join(lines)


def _is_finished(results: Results) -> bool:
    return all(run.finished or run.diverged for model in results.models for run in model.runs)


def _table_1(evidence: Evidence) -> str:
    quoted = [
        "| quoted from the paper | parameters | time | valid | test | test, against the Transformer |",
        "| :-- | --: | --: | --: | --: | --: |",
    ]
    for name, pair in PAPER.items():
        quoted.append(_paper_line(f"Transformer {name}", pair.transformer, pair.transformer))
        quoted.append(_paper_line(f"KAN {name}", pair.ours, pair.transformer))
    studies = [evidence.studies[name] for name in PAPER if name in evidence.studies]
    parts = [
        "\n".join(quoted),
        "KAN is the paper's name for KalmaGrove. WikiText-103, 8 V100, minutes an epoch. Its perplexities are not "
        "those of the tables below, whose tokens are others: what can be compared are the ratios.",
        *map(_our_table, studies),
        *filter(None, map(_other_text, studies)),
    ]
    return "\n\n".join(parts)


def _our_table(study: Study) -> str:
    reference = study.results.model(study.results.baseline)
    lines = [
        f"| {study.name}, here | parameters | time | valid perplexity | test perplexity | of words, test | "
        "test, against the reference (95 %) |",
        "| :-- | --: | --: | --: | --: | --: | --: |",
        *(_our_line(study, model, reference) for model in study.results.models),
    ]
    results = study.results
    plain = [model.name for model in study.plain_transformers]
    return "\n".join(lines) + (
        f"\n\nPerplexity of tokens of a vocabulary of {results.data.vocab_size:,}; time of a step, in turns in one "
        "process. The reference is the best on the validation split of the plain Transformers with their usual "
        f"optimiser, of which there are: {', '.join(plain) or 'none'}. {results.tokens_per_parameter:.2g} training "
        f"tokens for each of its parameters, {results.budget.epochs:.2g} passes over the text."
    )


def _paper_line(name: str, row: PaperRow, reference: PaperRow) -> str:
    return (
        f"| *{name}* | {row.parameters:.0f} M, {row.parameters / reference.parameters:.2f}x | {row.minutes} min, "
        f"{row.minutes / reference.minutes:.2f}x | {row.valid} | {row.test} | {row.test / reference.test:.3f}x |"
    )


def _our_line(study: Study, model: Model, reference: Model) -> str:
    is_reference = model.name == reference.name
    spread = median_spread(study.results.time_ratios(model.name))
    time = "1" if is_reference else "-" if spread is None else f"{spread.median:.2f}x"
    ratio = model.ratio_to(reference)
    columns: tuple[tuple[Split, Metric], ...] = (
        ("valid", "perplexity"),
        ("test", "perplexity"),
        ("test", "word_perplexity"),
    )
    scores = [mean_of(model.by_seed(*column)) for column in columns]
    shown_scores = " | ".join("-" if score is None else format_score(score) for score in scores)
    name = f"{model.name}, {model.optim}{' (reference)' if is_reference else ''}"
    return (
        f"| {name} | {format_count(model.parameters.total)}, "
        f"{model.parameters.total / reference.parameters.total:.2f}x | {time} | {shown_scores} | "
        f"{'1' if is_reference else shown(ratio)} |"
    )


def _other_text(study: Study) -> str:
    reference = study.other_text.get(study.results.baseline, {})
    scored = {name: values for name, values in study.other_text.items() if values}
    if not scored:
        return ""
    found = "; ".join(
        f"{name} {format_score(mean_of(values) or 0.0)}"
        + ("" if name == study.results.baseline else f", {shown(ratio_interval(values, reference))}")
        for name, values in scored.items()
    )
    return f"Word perplexity on a second text, {study.name}: {found}."


def _claims(answers: list[Answer]) -> str:
    lines = ["| | claim | the paper | here | verdict | what it rests on |", "| :-- | :-- | :-- | :-- | :-- | :-- |"]
    for answer in answers:
        lines.append(
            f"| {answer.name} | {answer.claim} | {answer.paper or '-'} | {answer.ours} | **{answer.verdict}** | "
            f"{answer.reason} |"
        )
    return "\n".join(lines)


def _machine(environment: Environment) -> str:
    threads = environment.torch_threads
    used = None if threads is None else "one thread" if threads == 1 else f"{threads} threads"
    known = (environment.cpu, f"{environment.usable_cores} cores", used, *environment.gpus)
    return ", ".join(text for text in known if text)


def _studies(origin: Origin, evidence: Evidence) -> list[str]:
    parts: list[str] = []
    for name in origin.studies:
        study = evidence.studies.get(name)
        if study is None:
            continue
        timed = study.results.timing_environment
        machine = _machine(study.results.environment)
        machine += "" if timed is None else f"; steps timed on {_machine(timed)}"
        parts += [
            f"## {name}: {STUDIES[name]}",
            f"    {study.results.command}",
            f"{study.results.data.source}, vocabulary {study.results.data.vocab_size:,}. {machine}.",
            study.note,
            to_markdown(build_table(study.results)),
        ]
    if evidence.laws is not None:
        parts += [f"## {LADDER}: {STUDIES[LADDER]}", _ladder(evidence.laws)]
        if evidence.rank_laws is not None and evidence.rank_laws is not evidence.laws:
            parts += ["The rank's exponent (C12) is that of runs of their own:", _ladder(evidence.rank_laws)]
    return parts


def _ladder(laws: Mapping[str, Any]) -> str:
    lines = [f"    {laws['command']}", ""] if "command" in laws else []
    lines += [f"{laws['runs']} runs; exponents of parameters (alpha) and of tokens (beta), with 95 % intervals:", ""]
    lines += [f"Left out: {line}." for line in laws["left_out"]] + [""] * bool(laws["left_out"])
    lines += ["| family | law | alpha | beta |", "| :-- | :-- | --: | --: |"]
    for family, found in laws["families"].items():
        for fit in found["laws"].values():
            cells = [_exponent(fit, name) for name in ("alpha", "beta")]
            lines.append(f"| {family} | {fit['formula']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _exponent(fit: Mapping[str, Any], name: str) -> str:
    if name not in fit["constants"]:
        return "-"
    low_high = fit["intervals"].get(name)
    return f"{fit['constants'][name]:.3f}" + ("" if low_high is None else f" ({low_high[0]:.3f} to {low_high[1]:.3f})")
