"""The paper's Table 1, and the pairs of rows as they were trained here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kalmagrove.report.results import Model, Split
from kalmagrove.report.statistics import FEWEST_SHOWN, Interval, Spread, median_spread
from kalmagrove.reproduction.answers import Verdict, judge_below
from kalmagrove.reproduction.evidence import Evidence, Study

MOST_EPOCHS = 4.0
"""Passes over a text up to which tokens are worth about as much as new ones (Muennighoff et al., arXiv:2305.16264)."""


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
        return self.ours.ratio_to(other, split)

    @property
    def time(self) -> Spread | None:
        """Paired ratios of step times."""
        return median_spread(self.study.results.time_ratios(self.ours.name))

    def doubts(self, rival: Model | None = None) -> list[str]:
        """What keeps a headline about this pair from being supported."""
        return [f"{self.name}: {doubt}" for doubt in doubts_about(self.study, self.ours, rival or self.rival)]


def doubts_about(study: Study, ours: Model, rival: Model) -> list[str]:
    """Why a comparison that looks good does not carry a headline."""
    results = study.results
    lost = sorted(lost_seeds(ours, rival))
    found = [f"{ours.name} diverged with seed {', '.join(map(str, lost))}"] if lost else []
    found += [] if results.is_tuned else ["learning rates not tuned"]
    if results.is_tuned and not results.rechecks:
        if results.trial_tokens is None:
            found.append("the length of the trials was not written down")
        elif results.trial_tokens < results.budget.tokens:
            part = results.trial_tokens / results.budget.tokens
            found.append(f"learning rates tuned over {part:.0%} of the length alone")
    if results.screening:
        found.append(f"screening, {results.tokens_per_parameter:.2g} training tokens a parameter")
    if results.budget.epochs > MOST_EPOCHS:
        found.append(f"{results.budget.epochs:.1f} passes over the text without dropout, which the smaller model bears")
    rates = {trial.lr_scale: trial.valid_loss for trial in results.rates_tried(rival)}
    auxiliary = {
        trial.auxiliary_scale: trial.valid_loss
        for of_model in results.auxiliary_trials
        for trial in of_model.trials
        if of_model.model == rival.name
    }
    for losses, what in ((rates, "learning rate"), (auxiliary, "rate of embeddings")):
        if is_at_edge(losses):
            found.append(f"the best {what} of {rival.name} is at the edge of those that were tried")
    return found


def is_at_edge(losses: Mapping[float, float | None]) -> bool:
    """Whether the best of a model's rates has no worse one on one of its sides; none where a rate diverged."""
    known = {scale: loss for scale, loss in losses.items() if loss is not None}
    if len(losses) < 2 or not known:
        return False
    return min(known, key=known.__getitem__) in (min(losses), max(losses))


def described(model: Model) -> str:
    """A model with its optimiser, which a name such as llama+adamw says already."""
    return model.name if model.optim in model.name.split("+") else f"{model.name} with {model.optim}"


def lost_seeds(ours: Model, rival: Model) -> set[int]:
    """Seeds with which we diverged, or ended with a loss that nothing can be reckoned with, and the rival did not."""
    ended = {run.seed for run in ours.runs if run.finished or run.diverged}
    return (ended - ours.by_seed("test", "perplexity").keys()) & rival.by_seed("test", "perplexity").keys()


def judge_perplexity(ratios: Sequence[Interval | None], ours: Model, rival: Model) -> Verdict:
    """Whether our perplexity is lower; where we diverged with every seed and the rival did not, it is not."""
    lost = lost_seeds(ours, rival)
    if lost and all(ratio is None for ratio in ratios):
        return "not supported" if len(lost) >= FEWEST_SHOWN else "undecided"
    return judge_below(ratios)


def held_back(verdict: Verdict, doubts: Sequence[str]) -> Verdict:
    """A verdict of supported that something speaks against is undecided."""
    return "undecided" if verdict == "supported" and doubts else verdict


def with_doubts(reason: str, doubts: Sequence[str]) -> str:
    """A reason with what speaks against it."""
    return "; ".join([reason, *doubts])


def pairs_of(evidence: Evidence) -> dict[str, Pair | None]:
    """Both pairs of Table 1."""
    return {name: pair_in(evidence, name) for name in PAPER}


def pairs_elsewhere(evidence: Evidence) -> dict[str, Pair | None]:
    """Those of the other studies, which differ in the text, the steps or the context."""
    return {name: pair_in(evidence, name) for name in evidence.studies if name not in PAPER}


def pair_in(evidence: Evidence, name: str) -> Pair | None:
    """The pair of a study, None where it is not there or has no KalmaGrove or no plain Transformer."""
    study = evidence.studies.get(name)
    ours, rival = (None, None) if study is None else (study.find("kalmagrove"), study.plain_transformer)
    return None if study is None or ours is None or rival is None else Pair(name, study, ours, rival)


def each(pairs: dict[str, Pair | None], text: Callable[[Pair], str]) -> str:
    """Something about each pair, in a line."""
    return "; ".join(f"{name} {text(pair)}" for name, pair in pairs.items() if pair is not None) or "-"


def quoted(column: str) -> str:
    """The paper's own ratios."""
    return "; ".join(f"{name} {pair.ratio(column):.2f}x" for name, pair in PAPER.items())
