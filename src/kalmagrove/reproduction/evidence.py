"""What the studies left in their folders, and the few numbers that a comparison's own report does not need."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalmagrove.errors import KalmaGroveError
from kalmagrove.files import read_json_object
from kalmagrove.models.presets import split_parts, split_preset
from kalmagrove.report.results import FILE_NAME, Model, Results, load_results
from kalmagrove.report.statistics import Spread, median_spread
from kalmagrove.reproduction.plan import LADDER, STUDIES
from kalmagrove.scaling.pages import FIT, LAW_FOLDER
from kalmagrove.scaling.plan import read_fit
from kalmagrove.training.config import default_optimizer, is_usual_transformer

OTHER_TEXT, NOTE = "other_text.json", "note.md"
LAW, RANK_LAW = f"{LADDER}/{LAW_FOLDER}/{FIT}", f"{LADDER}/rank_{LAW_FOLDER}/{FIT}"
"""The ladder's laws; and where its ranks were trained in a sweep of their own, whose rates may differ, that one's."""


@dataclass(frozen=True)
class Study:
    """A comparison that has at least begun.

    Attributes:
        name: Of the study.
        results: What it has found so far.
        other_text: Word perplexity on the second text by model and seed; empty where it was not asked for.
        note: What whoever ran the study has to say about how it came about, which the page shows; mostly nothing.
    """

    name: str
    results: Results
    other_text: Mapping[str, Mapping[int, float]]
    note: str = ""

    def find(self, family: str, *parts: str, optim: str | None = None) -> Model | None:
        """The model of a family with these parts put into it; None where there is none.

        Args:
            family: Of the preset.
            parts: Put into it.
            optim: Of the model; left out is the family's usual one where there are several.
        """
        found = []
        for model in self.results.models:
            preset, has = split_parts(model.preset)
            if split_preset(preset)[0] == family and has == parts and optim in (None, model.optim):
                found.append(model)
        usual = [model for model in found if model.optim == default_optimizer(family)]
        return next(iter([*usual, *found]), None)

    @property
    def plain_transformers(self) -> list[Model]:
        """The plain Transformers that are trained as is usual, of which the better one is the reference."""
        return [model for model in self.results.models if is_usual_transformer(model.preset, model.optim)]

    @property
    def plain_transformer(self) -> Model | None:
        """The reference; None where no plain Transformer was trained, so that something else stands in its place."""
        return next((model for model in self.plain_transformers if model.name == self.results.baseline), None)

    def time_of(self, model: Model, reference: Model) -> Spread | None:
        """Ratios of step times that were measured in turns; None where they were not."""
        own, other = (self.results.time_ratios(one.name) for one in (model, reference))
        if reference.name == self.results.baseline:
            return median_spread(own)
        # Both were measured against a third model, in the same blocks of steps.
        return median_spread([a / b for a, b in zip(own, other, strict=True)]) if len(own) == len(other) else None

    def excess(self, model: Model) -> dict[int, float]:
        """Nats a token above the optimum on the test split of a synthetic task, by seed."""
        found = {run.seed: run.test.excess for run in model.runs if run.test is not None}
        return {seed: excess for seed, excess in found.items() if excess is not None}

    def spikes(self, model: Model) -> dict[int, float]:
        """Spikes of the training loss in a thousand steps, by seed."""
        return {run.seed: run.spikes for run in model.runs if run.spikes is not None}


@dataclass(frozen=True)
class Evidence:
    """All studies that have begun, and the fitted laws of the ladder: of all its runs, and of those about the rank."""

    studies: Mapping[str, Study]
    laws: Mapping[str, Any] | None
    rank_laws: Mapping[str, Any] | None

    def study_of(
        self, *wanted: Callable[[Study], Model | None], most: Callable[[Study], float] = lambda _: 0
    ) -> Study | None:
        """The first study that has all of some models, one of enough tokens before one that is a screening.

        Args:
            wanted: Finds each of the models.
            most: Of several such studies the one with the most of this is taken.
        """
        found = [study for study in self.studies.values() if all(find(study) is not None for find in wanted)]
        return min(found, key=lambda study: (study.results.screening, -most(study)), default=None)


def load_evidence(folder: Path) -> Evidence:
    """Reads what there is.

    Raises:
        KalmaGroveError: A file is damaged.
    """
    studies = {}
    for name in STUDIES:
        if (folder / name / FILE_NAME).is_file():
            own = folder / name
            studies[name] = Study(name, load_results(own), _other_text(own), read_note(own))
    laws, rank_laws = (read_fit(folder / law) if (folder / law).is_file() else None for law in (LAW, RANK_LAW))
    return Evidence(studies, laws, rank_laws or laws)


def read_other_text(folder: Path) -> dict[str, Any]:
    """What ``other_text.json`` of a comparison holds: its source and the scores by model and seed; nothing without one.

    Raises:
        KalmaGroveError: The file is damaged.
    """
    path = folder / OTHER_TEXT
    return read_json_object(path, "remove it to score that text again") if path.is_file() else {}


def read_note(folder: Path) -> str:
    """What ``note.md`` of a comparison says; nothing without one.

    Raises:
        KalmaGroveError: It is not text in UTF-8.
    """
    try:
        return (folder / NOTE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise KalmaGroveError(f"{folder / NOTE} cannot be read as text in UTF-8; mend or remove it") from error


def _other_text(folder: Path) -> dict[str, dict[int, float]]:
    scores = read_other_text(folder).get("scores", {})
    return {
        model: {int(seed): s["word_perplexity"] for seed, s in seeds.items() if s["word_perplexity"] is not None}
        for model, seeds in scores.items()
    }


def tokens_to_reach(tokens: Sequence[int], losses: Sequence[float], level: float) -> float | None:
    """Training tokens at which a validation curve first comes down to a level, between two evaluations by a line."""
    for place, (token, loss) in enumerate(zip(tokens, losses, strict=True)):
        if loss <= level:
            if place == 0 or losses[place - 1] <= loss:
                return float(token)
            part = (losses[place - 1] - level) / (losses[place - 1] - loss)
            return tokens[place - 1] + part * (token - tokens[place - 1])
    return None


def part_to_reach(model: Model, rival: Model) -> dict[int, float | None]:
    """By seed the part of the rival's tokens that a model needs to come down to the rival's last evaluation.

    A model in the middle of its schedule is above what a schedule of that length would give, so the part is an upper
    bound. None where it never came down so far, or diverged.
    """
    rivals = {run.seed: run.valid_curve for run in rival.runs if run.finished and run.valid_curve.tokens}
    parts: dict[int, float | None] = {}
    for run in model.runs:
        if run.seed not in rivals or not (run.finished or run.diverged):
            continue
        if run.diverged:
            parts[run.seed] = None
            continue
        level, total = rivals[run.seed].loss[-1], rivals[run.seed].tokens[-1]
        needed = tokens_to_reach(run.valid_curve.tokens, run.valid_curve.loss, level)
        parts[run.seed] = None if needed is None else needed / total
    return parts


def mean_of(values: Mapping[int, float]) -> float | None:
    """Mean over seeds; None of no seeds."""
    return statistics.fmean(values.values()) if values else None
