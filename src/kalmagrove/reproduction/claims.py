"""The paper's fourteen claims, each answered from what the studies measured and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kalmagrove.report.results import Model, Split
from kalmagrove.report.statistics import Interval, mean_interval, median_spread, ratio_interval
from kalmagrove.report.table import format_bytes
from kalmagrove.reproduction.answers import Answer, Verdict, judge_below_one, shown
from kalmagrove.reproduction.evidence import Evidence, Study, part_to_reach, step_time_ratio, trained_rates
from kalmagrove.scaling.claims import scaling_claims

SPLITS: tuple[Split, ...] = ("valid", "test")
CLOSE = 0.1
"""Nats above the best within which a learning rate counts as one that trains."""


@dataclass(frozen=True)
class PaperRow:
    """A line of the paper's Table 1: millions of parameters, minutes an epoch, valid and test perplexity."""

    parameters: float
    minutes: float
    valid: float
    test: float


@dataclass(frozen=True)
class PaperPair:
    """A Transformer and a KalmaGrove of Table 1."""

    transformer: PaperRow
    ours: PaperRow

    def ratio(self, column: str) -> float:
        """Ours over the Transformer's."""
        found: float = getattr(self.ours, column) / getattr(self.transformer, column)
        return found


PAPER = {
    "base": PaperPair(PaperRow(125, 15.2, 34.5, 35.8), PaperRow(70, 11.0, 32.1, 33.2)),
    "large": PaperPair(PaperRow(355, 31.7, 29.4, 29.8), PaperRow(180, 18.9, 28.7, 29.1)),
}


@dataclass(frozen=True)
class Pair:
    """The two sides of a row pair of Table 1 as they were trained here."""

    name: str
    study: Study
    ours: Model
    rival: Model

    def perplexity(self, split: Split, rival: Model | None = None) -> Interval | None:
        """The ratio of perplexities, paired by seed."""
        other = self.rival if rival is None else rival
        return ratio_interval(self.ours.by_seed(split, "perplexity"), other.by_seed(split, "perplexity"))


def answer_claims(evidence: Evidence) -> list[Answer]:
    """All fourteen, in their order."""
    pairs = _pairs(evidence)
    answers = [_parameters(pairs), _time(pairs), _perplexity(pairs), _same_size(pairs)]
    answers += [_fewer_steps(evidence), _stable(evidence)]
    answers += [_alone(evidence, "C7", "grove"), _alone(evidence, "C8", "arnold")]
    return [*answers, _memory(pairs), *_scaling(evidence), _synthetic(evidence), _greener(pairs)]


def _pairs(evidence: Evidence) -> list[Pair]:
    pairs = []
    for name in PAPER:
        study = evidence.studies.get(name)
        ours = study.find("kalmagrove") if study is not None else None
        if study is not None and ours is not None:
            pairs.append(Pair(name, study, ours, study.results.model(study.results.baseline)))
    return pairs


def _each(pairs: list[Pair], text: Callable[[Pair], str]) -> str:
    return "; ".join(f"{pair.name} {text(pair)}" for pair in pairs) or "-"


def _quoted(column: str) -> str:
    return "; ".join(f"{name} {pair.ratio(column):.2f}x" for name, pair in PAPER.items())


def _complete(pairs: list[Pair], verdict: Verdict) -> Verdict:
    """A verdict that would be supported by one pair alone waits for the other."""
    return "undecided" if verdict == "supported" and len(pairs) < len(PAPER) else verdict


def _parameters(pairs: list[Pair]) -> Answer:
    def ratio(pair: Pair) -> float:
        return pair.ours.parameters.total / pair.rival.parameters.total

    def text(pair: Pair) -> str:
        inner = pair.ours.parameters.non_embedding / pair.rival.parameters.non_embedding
        return f"{ratio(pair):.2f}x ({inner:.2f}x without embeddings)"

    largest = max(pair.ratio("parameters") for pair in PAPER.values())
    verdict: Verdict = "not measured"
    if pairs:
        verdict = _complete(pairs, "supported" if all(ratio(p) <= largest for p in pairs) else "not supported")
    reason = f"supported means at most the paper's own {largest:.2f}x of the better AdamW Transformer, in each pair"
    return Answer("C1", "half the parameters", _quoted("parameters"), _each(pairs, text), verdict, reason)


def _time(pairs: list[Pair]) -> Answer:
    spreads = {p.name: median_spread(p.study.results.time_ratios(p.ours.name)) for p in pairs}

    def text(pair: Pair) -> str:
        spread = spreads[pair.name]
        return "-" if spread is None else f"{spread.median:.2f}x (10-90 %: {spread.low:.2f}-{spread.high:.2f})"

    known = [spread for spread in spreads.values() if spread is not None]
    verdict: Verdict = "not measured" if not known else "undecided"
    if known and all(spread.high < 1 for spread in known):
        verdict = _complete(pairs, "supported")
    elif any(spread.low > 1 for spread in known):
        verdict = "not supported"
    reason = "steps of both in turns in one process, the optimiser's time included; an epoch has as many steps for both"
    return Answer("C2", "faster epochs", _quoted("minutes"), _each(pairs, text), verdict, reason)


def _perplexity(pairs: list[Pair]) -> Answer:
    ratios = [pair.perplexity(split) for pair in pairs for split in SPLITS]
    ours = _each(pairs, lambda p: f"valid {shown(p.perplexity('valid'))}, test {shown(p.perplexity('test'))}")
    reason = "against the better of gpt2 and llama, each tuned, with AdamW; same tokens in the same order"
    quoted = f"valid {_quoted('valid')}; test {_quoted('test')}"
    verdict = _complete(pairs, judge_below_one(ratios))
    return Answer("C3", "lower perplexity", quoted, ours, verdict, reason)


def _same_size(pairs: list[Pair]) -> Answer:
    rivals = {pair.name: pair.study.find("slim") for pair in pairs}
    ratios = {p.name: None if (slim := rivals[p.name]) is None else p.perplexity("test", slim) for p in pairs}
    verdict = _complete(pairs, judge_below_one(list(ratios.values())))
    reason = "against slim: dense, as many parameters, the same cheap tricks, the same optimiser, tuned alike"
    return Answer("C4", "better at equal size", "", _each(pairs, lambda p: shown(ratios[p.name])), verdict, reason)


def _fewer_steps(evidence: Evidence) -> Answer:
    study = evidence.studies.get("optimizers")
    kalma, adamw = (study.find("llama", optim=o) if study else None for o in ("kalma", "adamw"))
    claim = "fewer iterations"
    reason = "llama with Kalma against llama with AdamW, both tuned: steps to AdamW's last loss"
    if kalma is None or adamw is None:
        return Answer("C5", claim, "", "-", "not measured", reason)
    parts = part_to_reach(kalma, adamw)
    reached = {seed: part for seed, part in parts.items() if part is not None}
    if len(reached) < len(parts) or not parts:
        ours = f"AdamW's last loss was reached with {len(reached)} of {len(parts)} seeds"
        return Answer("C5", claim, "", ours, "not supported" if parts else "not measured", reason)
    ratio, step = ratio_interval(reached, dict.fromkeys(reached, 1.0)), step_time_ratio(kalma, adamw)
    seconds = "" if step is None or ratio is None else f"; {ratio.mean * step:.2f}x of its seconds"
    reason += "; an upper bound, read in the middle of Kalma's schedule"
    return Answer("C5", claim, "", f"{shown(ratio)} of the steps{seconds}", judge_below_one([ratio]), reason)


def _stable(evidence: Evidence) -> Answer:
    study = evidence.studies.get("optimizers")
    kalma, adamw = (study.find("llama", optim=o) if study else None for o in ("kalma", "adamw"))
    reason = f"llama; a spike is a step far above the running mean; rates within {CLOSE} nats of the best count"
    if study is None or kalma is None or adamw is None:
        return Answer("C6", "stable", "", "-", "not measured", reason)
    spikes = {model.optim: study.spikes(model) for model in (kalma, adamw)}
    spans = {model.optim: trained_rates(model, CLOSE) for model in (kalma, adamw)}
    diverged = {model.optim: sum(run.diverged for run in model.runs) for model in (kalma, adamw)}
    ours = "; ".join(
        f"{name}: {_number(spikes[name])} spikes in 1,000 steps, rates over a factor of {_number(spans[name])}, "
        f"{diverged[name]} diverged"
        for name in ("kalma", "adamw")
    )
    no_worse = [
        (spikes["kalma"] or 0) <= (spikes["adamw"] or 0),
        (spans["kalma"] or 0) >= (spans["adamw"] or 0),
        diverged["kalma"] <= diverged["adamw"],
    ]
    measured = None not in spikes.values() and None not in spans.values()
    verdict: Verdict = "undecided"
    if not measured:
        verdict = "not measured"
    elif all(no_worse):
        verdict = "supported"
    elif not any(no_worse[:2]):
        verdict = "not supported"
    return Answer("C6", "stable", "", ours, verdict, reason)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _alone(evidence: Evidence, name: str, part: str) -> Answer:
    """Grove or Arnold put into llama, and nothing else changed."""
    claim = f"{part.capitalize()} alone"
    lines, ratios = [], []
    for study_name in ("parts", "long_context") if part == "arnold" else ("parts",):
        study = evidence.studies.get(study_name)
        plain, changed = (study.find("llama", *p, optim="adamw") if study else None for p in ((), (part,)))
        if study is None or plain is None or changed is None:
            continue
        ratio = ratio_interval(changed.by_seed("test", "perplexity"), plain.by_seed("test", "perplexity"))
        ratios.append(ratio)
        step, length = step_time_ratio(changed, plain), study.results.budget.context_length
        lines.append(
            f"context {length}: perplexity {shown(ratio)}, parameters "
            f"{changed.parameters.total / plain.parameters.total:.2f}x, FLOPs "
            f"{changed.flops_per_token / plain.flops_per_token:.2f}x, time a step {_number(step)}x"
        )
    reason = "put into llama, AdamW on both sides, tuned alike; supported means surely lower perplexity"
    return Answer(name, claim, "", "; ".join(lines) or "-", judge_below_one(ratios), reason)


def _memory(pairs: list[Pair]) -> Answer:
    peaks = {p.name: (p.ours.peak_memory_bytes, p.rival.peak_memory_bytes) for p in pairs}
    known = {name: (ours, rival) for name, (ours, rival) in peaks.items() if ours and rival}

    def text(pair: Pair) -> str:
        if pair.name not in known:
            return "-"
        ours, rival = known[pair.name]
        return f"{ours / rival:.2f}x ({format_bytes(ours)} against {format_bytes(rival)})"

    verdict: Verdict = "not measured" if not known else "undecided"
    if known and all(ours < rival for ours, rival in known.values()):
        verdict = _complete(pairs, "supported")
    elif any(ours > rival for ours, rival in known.values()):
        verdict = "not supported"
    reason = "peak of a training process less what it held before: weights, gradients, optimiser, activations"
    return Answer("C9", "less memory", "", _each(pairs, text), verdict, reason)


def _scaling(evidence: Evidence) -> list[Answer]:
    wanted = {
        "C10": "steeper in parameters",
        "C11": "the same exponent of data",
        "C12": "the rank governs the loss",
    }
    found = {} if evidence.laws is None else scaling_claims(evidence.laws)
    answers = []
    for name, says in wanted.items():
        claims = [(subject, claim) for subject, all_of in found.items() for claim in all_of if claim.name == name]
        if name != "C12":
            claims = [(subject, claim) for subject, claim in claims if subject.startswith("kalmagrove")]
        verdict: Verdict = "not measured"
        if claims:
            verdicts: set[Verdict] = {claim.verdict for _, claim in claims}
            verdict = verdicts.pop() if len(verdicts) == 1 else "undecided"
        ours = "; ".join(f"{subject}: {claim.verdict}, {claim.reason}" for subject, claim in claims)
        reason = "every law and every baseline must agree, with 95 % intervals by bootstrap over runs and seeds"
        answers.append(Answer(name, says, "alpha larger, beta about equal" if name != "C12" else "f(r)", ours or "-",
                              verdict, reason))  # fmt: skip
    return answers


def _synthetic(evidence: Evidence) -> Answer:
    lines: list[str] = []
    ratios: list[Interval | None] = []
    for name in ("hierarchy", "recall"):
        study = evidence.studies.get(name)
        ours = study.find("kalmagrove") if study else None
        if study is None or ours is None:
            ratios.append(None)
            continue
        rival = study.results.model(study.results.baseline)
        excess, theirs = study.excess(ours), study.excess(rival)
        ratios.append(ratio_interval(excess, theirs))
        lines.append(f"{name} {shown(ratios[-1])} ({_mean(excess)} against {_mean(theirs)} nats)")
    reason = "nats a token above the known optimum, against the better AdamW Transformer"
    known = [ratio for ratio in ratios if ratio is not None]
    verdict = judge_below_one(ratios) if known else "not measured"
    return Answer("C13", "better on two synthetic tasks", "", "; ".join(lines) or "-", verdict, reason)


def _mean(values: Mapping[int, float]) -> str:
    return f"{mean_interval(list(values.values())).mean:.3f}" if values else "-"


def _greener(pairs: list[Pair]) -> Answer:
    ratios: dict[str, Interval | None] = {}
    for pair in pairs:
        parts = part_to_reach(pair.ours, pair.rival)
        per_token = pair.ours.flops_per_token / pair.rival.flops_per_token
        reached = {seed: part * per_token for seed, part in parts.items() if part is not None}
        whole = len(reached) == len(parts)
        ratios[pair.name] = ratio_interval(reached, dict.fromkeys(reached, 1.0)) if whole else None
    verdict = _complete(pairs, judge_below_one(list(ratios.values())))
    reason = (
        "FLOPs of forward and backward to the Transformer's last validation loss, not measured joules; an optimiser's "
        "own are not counted; '-' where that loss was not reached with every seed"
    )
    return Answer("C14", "greener", "", _each(pairs, lambda p: shown(ratios[p.name])), verdict, reason)
