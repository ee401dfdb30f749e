"""The claims about one part by itself, and about the synthetic tasks."""

from __future__ import annotations

from collections.abc import Callable

from kalmagrove.report.results import Model
from kalmagrove.report.statistics import CONFIDENCE, FEWEST_SHOWN, Interval, mean_interval
from kalmagrove.reproduction.answers import Answer, Verdict, all_of, judge_below, judge_times, shown, shown_time
from kalmagrove.reproduction.evidence import Evidence, Study, TrainedRates, part_to_reach, trained_rates
from kalmagrove.reproduction.pairs import doubts_about, held_back, judge_perplexity, lost_seeds, with_doubts
from kalmagrove.reproduction.plan import LONG_CONTEXT
from kalmagrove.reproduction.table_claims import in_seconds, scaled

CLOSE = 0.1
"""Nats above the best within which a learning rate counts as one that trains."""
SYNTHETIC = ("hierarchy", "recall")


def _of_kalma(study: Study) -> Model | None:
    return study.find("llama", optim="kalma")


def _of_adamw(study: Study) -> Model | None:
    return study.find("llama", optim="adamw")


def _rates_tried(study: Study) -> int:
    return sum(len(model.lr_trials) for model in (_of_kalma(study), _of_adamw(study)) if model is not None)


def _kalma_and_adamw(
    evidence: Evidence, most: Callable[[Study], float] = lambda _: 0
) -> tuple[Study, Model, Model] | None:
    study = evidence.study_of(_of_kalma, _of_adamw, most=most)
    kalma, adamw = (find(study) if study else None for find in (_of_kalma, _of_adamw))
    return None if study is None or kalma is None or adamw is None else (study, kalma, adamw)


def fewer_steps(evidence: Evidence) -> Answer:
    """C5."""
    claim, reason = "fewer iterations", "llama with Kalma against llama with AdamW: steps to AdamW's last loss"
    found = _kalma_and_adamw(evidence)
    parts = {} if found is None else part_to_reach(found[1], found[2])
    if found is None or not parts:
        return Answer("C5", claim, "", "-", "not measured", reason)
    study, kalma, adamw = found
    doubts = doubts_about(study, kalma, adamw)
    reached = {seed: part for seed, part in parts.items() if part is not None}
    if len(reached) < len(parts):
        ours = f"AdamW's last loss was reached with {len(reached)} of {len(parts)} seeds"
        # Each seed without it needs more steps than AdamW; how many, nobody saw.
        fails = not reached and len(parts) >= FEWEST_SHOWN
        return Answer("C5", claim, "", ours, "not supported" if fails else "undecided", with_doubts(reason, doubts))
    steps, spread = scaled(reached, 1.0), study.time_of(kalma, adamw)
    seconds = None if spread is None else in_seconds(reached, spread)
    reason = (
        f"{reason}, in {study.name}; an upper bound, as it is read in mid-schedule, from losses on a part of the "
        "validation split; the verdict is of the steps"
    )
    ours = f"{shown(steps)} of the steps, {shown(seconds)} of the seconds"
    return Answer("C5", claim, "", ours, held_back(judge_below([steps]), doubts), with_doubts(reason, doubts))


def stable(evidence: Evidence) -> Answer:
    """C6."""
    about = (
        f"llama; a spike is a step far above the running mean; rates are those around the best within {CLOSE} nats of "
        "it; supported means no worse in all three and better in one, with three seeds or more: spikes by their 95 % "
        "interval over seeds, rates where those of the other side were seen to end, runs that diverged by Fisher's "
        "exact test at 5 %"
    )
    found = _kalma_and_adamw(evidence, most=_rates_tried)
    if found is None:
        return Answer("C6", "stable", "", "-", "not measured", about)
    study, kalma, adamw = found
    reason = f"{about}; in {study.name}"
    spikes, rates = [study.spikes(m) for m in (kalma, adamw)], [trained_rates(m, CLOSE) for m in (kalma, adamw)]
    # Of the seeds that ended on both sides.
    ended = [{run.seed: run.diverged for run in m.runs if run.finished or run.diverged} for m in (kalma, adamw)]
    both = ended[0].keys() & ended[1].keys()
    diverged = [sum(of_model[seed] for seed in both) for of_model in ended]
    ours = "; ".join(
        f"{model.optim}: {_mean(spikes[n], 2)} spikes in 1,000 steps, rates over a factor of {_factor(rates[n])}, "
        f"{diverged[n]} diverged"
        for n, model in enumerate((kalma, adamw))
    )
    if not spikes[0].keys() & spikes[1].keys() or rates[0] is None or rates[1] is None:
        return Answer("C6", "stable", "", ours, "not measured", reason)
    doubts = doubts_about(study, kalma, adamw)
    # Each positive where Kalma is the better one.
    leads = [_fewer_spikes(*spikes), _wider_rates(rates[0], rates[1]), _fewer_diverged(*diverged, of=len(both))]
    verdict: Verdict = "undecided"
    if len(both) >= FEWEST_SHOWN and min(leads) >= 0 and max(leads) > 0 and diverged[0] <= diverged[1]:
        verdict = "supported"
    elif len(both) >= FEWEST_SHOWN and max(leads) <= 0 and min(leads) < 0:
        verdict = "not supported"
    return Answer("C6", "stable", "", ours, held_back(verdict, doubts), with_doubts(reason, doubts))


def _fewer_spikes(ours: dict[int, float], theirs: dict[int, float]) -> int:
    """1 or -1 where the interval over seeds says which side has fewer, else 0."""
    bounds = mean_interval([theirs[seed] - ours[seed] for seed in ours.keys() & theirs.keys()]).bounds
    return 0 if bounds is None else int(bounds[0] > 0) - int(bounds[1] < 0)


def _fewer_diverged(ours: int, theirs: int, *, of: int) -> int:
    """1 or -1 where fewer runs of one side diverged than chance would have it, of as many on both; else 0."""
    from scipy.stats import fisher_exact

    if ours == theirs or fisher_exact([[ours, of - ours], [theirs, of - theirs]]).pvalue >= 1 - CONFIDENCE:
        return 0
    return 1 if ours < theirs else -1


def _wider_rates(ours: TrainedRates, theirs: TrainedRates) -> int:
    """1 or -1 where one side's rates are the wider ones, and the other's were seen to end; else 0."""
    return int(ours.factor > theirs.factor and theirs.is_whole) - int(theirs.factor > ours.factor and ours.is_whole)


def _factor(rates: TrainedRates | None) -> str:
    return "-" if rates is None else f"{'' if rates.is_whole else 'at least '}{rates.factor:g}"


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
