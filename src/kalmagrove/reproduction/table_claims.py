"""The claims that Table 1 carries: parameters, time, perplexity, equal size, memory, cost to a loss."""

from __future__ import annotations

from kalmagrove.report.statistics import FEWEST_SHOWN, Interval, Spread, ratio_interval
from kalmagrove.report.table import format_bytes
from kalmagrove.reproduction.answers import (
    FEWEST_TIMES,
    Answer,
    Verdict,
    all_of,
    judge_below,
    judge_times,
    shown,
    shown_time,
)
from kalmagrove.reproduction.evidence import part_to_reach
from kalmagrove.reproduction.pairs import (
    PAPER,
    Pair,
    described,
    each,
    held_back,
    judge_perplexity,
    lost_seeds,
    quoted,
    with_doubts,
)

Pairs = dict[str, Pair | None]
MEMORY_NOISE = 0.02
"""Peaks of memory that differ by no more than this part are a tie."""


def parameters(pairs: Pairs) -> Answer:
    """C1."""
    verdicts: list[Verdict] = []
    for name, pair in pairs.items():
        if pair is None:
            verdicts.append("not measured")
        else:
            verdicts.append("supported" if _size(pair) <= PAPER[name].ratio("parameters") else "not supported")

    def text(pair: Pair) -> str:
        inner = pair.ours.parameters.non_embedding / pair.rival.parameters.non_embedding
        vocabulary = f"vocabulary {pair.study.results.data.vocab_size:,}"
        return f"{_size(pair):.2f}x with {vocabulary} ({inner:.2f}x without embeddings)"

    reason = (
        "supported means at most the paper's own ratio to the better AdamW Transformer, in each pair; both have the "
        "same embeddings, so a larger vocabulary gives a larger ratio"
    )
    return Answer("C1", "half the parameters", quoted("parameters"), each(pairs, text), all_of(verdicts), reason)


def _size(pair: Pair) -> float:
    return pair.ours.parameters.total / pair.rival.parameters.total


def time(pairs: Pairs, elsewhere: Pairs) -> Answer:
    """C2.

    Args:
        pairs: Of Table 1.
        elsewhere: Of the other studies, whose steps and contexts are others.
    """
    verdict = judge_times([None if pair is None else pair.time for pair in pairs.values()])

    def text(pair: Pair) -> str:
        budget = pair.study.results.budget
        return f"{shown_time(pair.time)} at {budget.tokens_per_step:,} tokens a step, context {budget.context_length:,}"

    slower = [p for p in elsewhere.values() if p is not None and judge_times([p.time]) == "not supported"]
    doubts = [f"slower in {pair.name}, {text(pair)}" for pair in slower]
    reason = (
        "supported means less than the Transformer's in each pair, and in no other study more; steps of both in turns "
        "in one process, the optimiser's time included; an epoch has as many steps for both"
    )
    ours, verdict = each(pairs, text), held_back(verdict, doubts)
    return Answer("C2", "faster epochs", quoted("minutes"), ours, verdict, with_doubts(reason, doubts))


def perplexity(pairs: Pairs) -> Answer:
    """C3."""
    ratios = {
        name: [None if pair is None else pair.perplexity(split) for split in ("valid", "test")]
        for name, pair in pairs.items()
    }
    verdicts = [
        "not measured" if pair is None else judge_perplexity(ratios[name], pair.ours, pair.rival)
        for name, pair in pairs.items()
    ]
    doubts = [doubt for pair in pairs.values() if pair is not None for doubt in pair.doubts()]
    reason = (
        f"supported means less than that of the best plain Transformer that was there ({each(pairs, _plain)}) in each "
        "pair; same "
        "tokens in the same order"
    )
    ours = each(pairs, lambda pair: f"valid {shown(ratios[pair.name][0])}, test {shown(ratios[pair.name][1])}")
    paper = f"valid {quoted('valid')}; test {quoted('test')}"
    verdict = held_back(all_of(verdicts), doubts)
    return Answer("C3", "lower perplexity", paper, ours, verdict, with_doubts(reason, doubts))


def _plain(pair: Pair) -> str:
    """Which plain Transformers were there, and which is the reference."""
    others = [described(model) for model in pair.study.plain_transformers if model.name != pair.rival.name]
    return " better than ".join([described(pair.rival), *others])


def same_size(pairs: Pairs) -> Answer:
    """C4."""
    ratios: dict[str, Interval | None] = {}
    verdicts: list[Verdict] = []
    doubts = []
    for name, pair in pairs.items():
        slim = None if pair is None else pair.study.find("slim")
        if pair is None or slim is None:
            verdicts.append("not measured")
            continue
        ratios[name] = pair.perplexity("test", slim)
        verdicts.append(judge_perplexity([ratios[name]], pair.ours, slim))
        doubts += pair.doubts(slim)
    reason = (
        "against slim: dense, as many parameters, the same cheap tricks, the same optimiser, rates tuned by the same "
        "rule"
    )
    verdict = held_back(all_of(verdicts), doubts)
    ours = each(pairs, lambda pair: shown(ratios.get(pair.name)))
    return Answer("C4", "better at equal size", "", ours, verdict, with_doubts(reason, doubts))


def memory(pairs: Pairs, elsewhere: Pairs) -> Answer:
    """C9.

    Args:
        pairs: Of Table 1.
        elsewhere: Of the other studies, whose steps and contexts are others.
    """
    verdicts = [_judge_memory(pair) for pair in pairs.values()]

    def text(pair: Pair) -> str:
        ours, rival, ratio = pair.ours.peak_memory_bytes, pair.rival.peak_memory_bytes, _memory_ratio(pair)
        if ratio is None or not ours or not rival:
            return "-"
        return f"{ratio:.2f}x ({format_bytes(ours)} against {format_bytes(rival)})"

    def found_elsewhere(verdict: Verdict, says: str) -> list[str]:
        found = [pair for pair in elsewhere.values() if pair is not None and _judge_memory(pair) == verdict]
        return [f"{says} in {pair.name}, {text(pair)}" for pair in found]

    doubts = found_elsewhere("not supported", "more")
    reason = (
        "supported means less than the Transformer's in each pair, and in no other study more; peak of a training "
        "process less what it held before: weights, gradients, optimiser, activations; one measurement each, within "
        f"{MEMORY_NOISE:.0%} a tie"
    )
    verdict = held_back(all_of(verdicts), doubts)
    return Answer(
        "C9",
        "less memory",
        "",
        each(pairs, text),
        verdict,
        with_doubts(reason, [*doubts, *found_elsewhere("undecided", "a tie")]),
    )


def _judge_memory(pair: Pair | None) -> Verdict:
    ratio = None if pair is None else _memory_ratio(pair)
    if ratio is None:
        return "not measured"
    if ratio < 1 - MEMORY_NOISE:
        return "supported"
    return "not supported" if ratio > 1 + MEMORY_NOISE else "undecided"


def _memory_ratio(pair: Pair) -> float | None:
    ours, rival = pair.ours.peak_memory_bytes, pair.rival.peak_memory_bytes
    return ours / rival if ours and rival else None


def greener(pairs: Pairs) -> Answer:
    """C14."""
    verdicts: list[Verdict] = []
    texts: dict[str, str] = {}
    doubts = []
    for name, pair in pairs.items():
        if pair is None:
            verdicts.append("not measured")
            continue
        found, texts[name] = _cost_to_loss(pair)
        verdicts.append(found)
        doubts += pair.doubts()
    reason = (
        "to the Transformer's last validation loss, by forward and backward FLOPs and by seconds, which count the "
        "optimiser too; not measured joules; an upper bound, read in the middle of our schedule from losses on a part "
        "of the validation split; what was not reached in a run that cost less is undecided"
    )
    verdict = held_back(all_of(verdicts), doubts)
    ours = each(pairs, lambda pair: texts[pair.name])
    return Answer("C14", "greener", "", ours, verdict, with_doubts(reason, doubts))


def _cost_to_loss(pair: Pair) -> tuple[Verdict, str]:
    parts = part_to_reach(pair.ours, pair.rival)
    if not parts:
        return "not measured", "-"
    reached = {seed: part for seed, part in parts.items() if part is not None}
    per_token, spread = pair.ours.flops_per_token / pair.rival.flops_per_token, pair.time
    if len(reached) < len(parts):
        # All tokens of both sides are as many, so that a whole run cost this part of the rival's.
        spent = {"FLOPs": per_token} | ({} if spread is None else {"seconds": spread.median})
        price = " and ".join(f"{part:.2f}x of the {name}" for name, part in spent.items())
        all_lost = len(lost_seeds(pair.ours, pair.rival)) == len(parts)
        fails = not reached and len(parts) >= FEWEST_SHOWN and (all_lost or max(spent.values()) >= 1)
        verdict: Verdict = "not supported" if fails else "undecided"
        return verdict, f"that loss was reached with {len(reached)} of {len(parts)} seeds, in runs of {price}"
    flops = scaled(reached, per_token)
    seconds = None if spread is None else in_seconds(reached, spread)
    return all_of([judge_below([flops]), judge_below([seconds])]), f"FLOPs {shown(flops)}, seconds {shown(seconds)}"


def scaled(parts: dict[int, float], factor: float) -> Interval | None:
    """The interval of parts of a rival's tokens, each token costing a factor of the rival's."""
    return ratio_interval({seed: part * factor for seed, part in parts.items()}, dict.fromkeys(parts, 1.0))


def in_seconds(parts: dict[int, float], time: Spread) -> Interval | None:
    """The same of a token's time, which is uncertain too: the bounds are those of both together, and so wide ones."""
    found = scaled(parts, 1.0)
    if found is None:
        return None
    middle = found.mean * time.median
    if found.low is None or found.high is None or time.n < FEWEST_TIMES:
        return Interval(middle, None, None, found.n)
    return Interval(middle, found.low * time.low, found.high * time.high, found.n)
