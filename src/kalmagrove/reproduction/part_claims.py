"""The claims about Grove or Arnold by itself, and about the synthetic tasks."""

from __future__ import annotations

from kalmagrove.report.results import Model
from kalmagrove.report.statistics import Interval, mean_interval
from kalmagrove.reproduction.answers import Answer, Verdict, all_of, judge_below, judge_times, shown, shown_time
from kalmagrove.reproduction.evidence import Evidence, Study
from kalmagrove.reproduction.pairs import doubts_about, held_back, judge_perplexity, lost_seeds, with_doubts
from kalmagrove.reproduction.plan import LONG_CONTEXT

SYNTHETIC = ("hierarchy", "recall")


def alone(evidence: Evidence, name: str, part: str) -> Answer:
    """C7 and C8: Grove or Arnold put into llama, and nothing else changed."""
    lines: list[str] = []
    verdicts: list[Verdict] = []
    doubts: list[str] = []
    for study_name in ("base", LONG_CONTEXT) if part == "arnold" else ("base",):
        study = evidence.studies.get(study_name)
        plain, changed = (study.find("llama", *p, optim="adamw") if study else None for p in ((), (part,)))
        if study is None or plain is None or changed is None:
            verdicts.append("not measured")
            continue
        found, line = _one_part(study, plain, changed, smaller=part == "grove")
        verdicts.append(found)
        lines.append(line)
        doubts += [f"{study_name}: {doubt}" for doubt in doubts_about(study, changed, plain)]
    wanted = "lower perplexity, fewer parameters and less time" if part == "grove" else "lower perplexity and less time"
    reason = f"put into llama, AdamW and rates tuned by the same rule on both sides; supported means {wanted}"
    verdict = held_back(all_of(verdicts), doubts)
    return Answer(name, f"{part.capitalize()} alone", "", "; ".join(lines) or "-", verdict, with_doubts(reason, doubts))


def _one_part(study: Study, plain: Model, changed: Model, *, smaller: bool) -> tuple[Verdict, str]:
    ratio = changed.ratio_to(plain)
    spread = study.time_of(changed, plain)
    size = changed.parameters.total / plain.parameters.total
    line = (
        f"context {study.results.budget.context_length}: perplexity {shown(ratio)}, parameters {size:.2f}x, FLOPs "
        f"{changed.flops_per_token / plain.flops_per_token:.2f}x, time a step {shown_time(spread)}"
    )
    sizes: list[Verdict] = [("supported" if size < 1 else "not supported")] if smaller else []
    lost: list[Verdict] = ["undecided"] if lost_seeds(changed, plain) else []
    return all_of([judge_perplexity([ratio], changed, plain), judge_times([spread]), *sizes, *lost]), line


def synthetic(evidence: Evidence) -> Answer:
    """C13."""
    lines: list[str] = []
    apart: list[Interval | None] = []
    doubts: list[str] = []
    for name in SYNTHETIC:
        study = evidence.studies.get(name)
        ours, rival = (study.find("kalmagrove"), study.plain_transformer) if study else (None, None)
        if study is None or ours is None or rival is None:
            apart.append(None)
            continue
        excess, theirs = study.excess(ours), study.excess(rival)
        both = sorted(excess.keys() & theirs.keys())
        apart.append(mean_interval([excess[seed] - theirs[seed] for seed in both]) if both else None)
        controls = [model for model in study.results.models if model.name not in (ours.name, rival.name)]
        lines.append(
            f"{name} {_mean(excess)} against {rival.name} {_mean(theirs)}, {_difference(apart[-1])}"
            + "".join(f"; {model.name} {_mean(study.excess(model))}" for model in controls)
        )
        doubts += [f"{name}: {doubt}" for doubt in doubts_about(study, ours, rival)]
    reason = (
        "nats a token above the known optimum, against the best plain Transformer with AdamW that was there; other "
        "models for comparison"
    )
    verdict = judge_below(apart, 0.0)
    return Answer(
        "C13", "better on two synthetic tasks", "", " · ".join(lines) or "-", held_back(verdict, doubts),
        with_doubts(reason, doubts),
    )  # fmt: skip


def _mean(values: dict[int, float], digits: int = 3) -> str:
    return f"{mean_interval(list(values.values())).mean:.{digits}f}" if values else "-"


def _difference(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    bounds = interval.bounds
    return f"{interval.mean:+.3f}" + ("" if bounds is None else f" ({bounds[0]:+.3f} to {bounds[1]:+.3f})")
