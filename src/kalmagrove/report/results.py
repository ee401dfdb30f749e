"""What ``results.json`` holds: the numbers of a comparison, finished or not, read strictly."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kalmagrove.errors import KalmaGroveError
from kalmagrove.report.statistics import Interval, ratio_interval

FORMAT = 1
FILE_NAME = "results.json"
ENOUGH_TOKENS_PER_PARAMETER = 20
"""Training tokens a parameter below which a comparison only screens ideas; about what compute-optimal training uses."""

LARGEST_NUMBER = 1e306
LARGEST_USABLE = 1e60
"""Value of a metric above which there is nothing to compare."""

Split = Literal["valid", "test"]
Metric = Literal["loss", "perplexity", "word_perplexity", "bits_per_byte"]


@dataclass(frozen=True)
class Scores:
    """How well a run predicts one split.

    Attributes:
        loss: Nats a token.
        perplexity: Of tokens; None where it is too large for a float.
        word_perplexity: Of whitespace-separated words; None where it is too large for a float.
        bits_per_byte: Bits a byte of UTF-8.
        tokens: Scored tokens.
        optimum: Nats a token of the best possible predictor, where it is known.
    """

    loss: float
    perplexity: float | None
    word_perplexity: float | None
    bits_per_byte: float
    tokens: int
    optimum: float | None = None

    @property
    def excess(self) -> float | None:
        """Nats a token above the optimum; None where that is not known."""
        return None if self.optimum is None else self.loss - self.optimum


@dataclass(frozen=True)
class Curve:
    """Training loss of one run, in nats a token, against training tokens and seconds of training."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class ValidCurve:
    """Validation loss of one run, in nats a token, against training tokens."""

    tokens: tuple[int, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One training with one seed; its scores are None until it is finished, and for ever when it diverged.

    Attributes:
        spikes: Of the training loss, in a thousand steps; None for a run too short to have any.
        source: Digest of the package's files when the run began; None where it was not written down.
    """

    seed: int
    folder: str
    diverged: bool
    seconds: float | None
    valid: Scores | None
    test: Scores | None
    curve: Curve
    valid_curve: ValidCurve
    spikes: float | None = None
    source: str | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has its test scores."""
        return self.test is not None


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, each shared one counted once."""

    total: int
    embedding: int
    non_embedding: int


@dataclass(frozen=True)
class LearningRateTrial:
    """One tried factor on the learning rates; the loss is None where the trial diverged or is not done."""

    lr_scale: float
    valid_loss: float | None


@dataclass(frozen=True)
class Recheck:
    """A model trained beside its rate by runs as long as the final ones.

    Attributes:
        model: Its name.
        chosen_before: The factor that the trials had chosen.
        trials: All that were tried at full length.
    """

    model: str
    chosen_before: float
    trials: tuple[LearningRateTrial, ...]


@dataclass(frozen=True)
class AuxiliaryTrial:
    """One tried factor on the rate of embeddings, head and vectors; the loss is None where the trial diverged."""

    auxiliary_scale: float
    valid_loss: float | None


@dataclass(frozen=True)
class AuxiliaryTrials:
    """All such factors of a model."""

    model: str
    trials: tuple[AuxiliaryTrial, ...]


@dataclass(frozen=True)
class Model:
    """One contestant: its configuration, its costs and its runs.

    Attributes:
        flops_per_token: Of training, forward and backward.
        decode_state_bytes: What decoding keeps for one sequence of the full context.
        step_seconds: Median.
        peak_memory_bytes: Of training.
    """

    name: str
    preset: str
    optim: str
    precision: str
    model_config: Mapping[str, object]
    optim_config: Mapping[str, object]
    lr_trials: tuple[LearningRateTrial, ...]
    lr_scale: float
    parameters: Parameters
    flops_per_token: int
    decode_state_bytes: int | None
    step_seconds: float | None
    peak_memory_bytes: int | None
    runs: tuple[Run, ...]
    auxiliary_scale: float = 1.0

    def by_seed(self, split: Split, metric: Metric) -> dict[int, float]:
        """The values of one metric by seed, from the runs that have one that can be reckoned with."""
        scores = {run.seed: run.valid if split == "valid" else run.test for run in self.runs}
        values = {seed: getattr(score, metric) for seed, score in scores.items() if score is not None}
        return {seed: value for seed, value in values.items() if value is not None and _is_usable(value)}

    def ratio_to(self, other: Model, split: Split = "test", metric: Metric = "perplexity") -> Interval | None:
        """The ratio of one metric to another model's, paired by seed; None where no seed has both."""
        return ratio_interval(self.by_seed(split, metric), other.by_seed(split, metric))


@dataclass(frozen=True)
class PairedTime:
    """Ratios of step times, each of two steps that ran side by side."""

    model: str
    baseline: str
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class SplitSize:
    """Size of one split."""

    tokens: int
    bytes: int
    words: int
    documents: int


@dataclass(frozen=True)
class Data:
    """The text that every model was trained and judged on; or a table, images or mixed lines, by its modality."""

    source: str
    fingerprint: str
    vocab_size: int
    tokenizer_fingerprint: str
    splits: Mapping[str, SplitSize]
    modality: str = "text"


@dataclass(frozen=True)
class Budget:
    """How long each run trains."""

    tokens: int
    steps: int
    tokens_per_step: int
    context_length: int
    epochs: float


@dataclass(frozen=True)
class Environment:
    """The machine and the packages, as far as they are known."""

    python: str | None = None
    platform: str | None = None
    cpu: str | None = None
    usable_cores: int | None = None
    torch_threads: int | None = None
    memory_bytes: int | None = None
    cuda: str | None = None
    gpus: tuple[str, ...] = ()
    packages: Mapping[str, str | None] | None = None
    source: str | None = None


@dataclass(frozen=True)
class Results:
    """A whole comparison.

    Attributes:
        command: Repeats it.
        created: ISO date.
        trials: Learning-rate trials a side; 1 is the preset's default, not tuned.
        trial_tokens: Training tokens of a trial; None in the records of earlier versions.
        baseline: Name of the reference, the better of the plain Transformers.
        candidate: Name of the model that is judged.
        rechecks: Of the models' learning rates at full length; none where none was asked for.
        auxiliary_trials: Of the rates of embeddings, head and vectors; none where they were not tuned.
        side_by_side: Whether runs were trained by several workers at a time, so that steps had to be timed apart.
        timing_environment: Machine on which that was done; None until it is.
    """

    format: int
    title: str
    command: str
    created: str
    data: Data
    budget: Budget
    seeds: tuple[int, ...]
    trials: int
    environment: Environment
    baseline: str
    candidate: str
    models: tuple[Model, ...]
    paired_time: tuple[PairedTime, ...]
    trial_tokens: int | None = None
    rechecks: tuple[Recheck, ...] = ()
    auxiliary_trials: tuple[AuxiliaryTrials, ...] = ()
    side_by_side: bool = False
    timing_environment: Environment | None = None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], where: str = FILE_NAME) -> Results:
        """Reads a JSON object.

        Args:
            record: The object; fields that this version does not know are passed over.
            where: Named in errors, such as the file's path.

        Raises:
            KalmaGroveError: A field is missing or wrong, or the format is a later one.
        """
        found = record.get("format") if isinstance(record, Mapping) else None
        if isinstance(found, int) and found != FORMAT:
            raise KalmaGroveError(f"{where} has format {found}, but this version reads format {FORMAT}")
        results: Results = _record(cls, record, where)
        results._check(where)
        return results

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that `from_dict` reads."""
        plain: dict[str, Any] = _plain(self)
        return plain

    def model(self, name: str) -> Model:
        """The model of that name.

        Raises:
            KeyError: There is none.
        """
        return {model.name: model for model in self.models}[name]

    @property
    def is_tuned(self) -> bool:
        """Whether learning rates were tried for every model."""
        return self.trials > 1 or bool(self.rechecks)

    def rates_tried(self, model: Model) -> tuple[LearningRateTrial, ...]:
        """Those at full length, where there are any, else those of the trials."""
        return next((recheck.trials for recheck in self.rechecks if recheck.model == model.name), model.lr_trials)

    def time_ratios(self, name: str) -> tuple[float, ...]:
        """Paired ratios of a model's step times to the baseline's; empty where none were measured."""
        found = (
            paired.ratios for paired in self.paired_time if (paired.model, paired.baseline) == (name, self.baseline)
        )
        return next(found, ())

    @property
    def tokens_per_parameter(self) -> float:
        """Training tokens a parameter of the baseline."""
        return self.budget.tokens / max(1, self.model(self.baseline).parameters.total)

    @property
    def screening(self) -> bool:
        """Whether the runs are too short to say what long training would give."""
        return self.tokens_per_parameter < ENOUGH_TOKENS_PER_PARAMETER

    def _check(self, where: str) -> None:
        if not self.seeds:
            raise KalmaGroveError(f"{where}: field 'seeds' names none")
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise KalmaGroveError(f"{where}: field 'models' has two models of the same name")
        for field_name, name in (("baseline", self.baseline), ("candidate", self.candidate)):
            if name not in names:
                raise KalmaGroveError(f"{where}: field {field_name!r} names {name!r}, which is not among the models")
        if self.baseline == self.candidate:
            raise KalmaGroveError(f"{where}: fields 'baseline' and 'candidate' both name {self.baseline!r}")
        for model in self.models:
            for run in model.runs:
                curve, valid = run.curve, run.valid_curve
                if not len(curve.tokens) == len(curve.seconds) == len(curve.loss):
                    raise KalmaGroveError(f"{where}: a curve of {model.name!r} has lists of different lengths")
                if len(valid.tokens) != len(valid.loss):
                    raise KalmaGroveError(f"{where}: a valid_curve of {model.name!r} has lists of different lengths")


def load_results(path: Path) -> Results:
    """Reads the results of a comparison.

    Args:
        path: The comparison's folder, or the file itself.

    Raises:
        KalmaGroveError: There is no such file, or it does not hold the results of a comparison.
    """
    file = path / FILE_NAME if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KalmaGroveError(f"{file} does not exist; give the folder of a comparison") from None
    except (OSError, ValueError, RecursionError) as error:
        raise KalmaGroveError(f"{file} cannot be read as JSON: {error}") from None
    return Results.from_dict(record, where=str(file))


def _record(kind: Any, value: Any, where: str) -> Any:
    """Builds a dataclass from a JSON object by its annotations."""
    if not isinstance(value, Mapping):
        raise KalmaGroveError(f"{where} must be an object, got {_shown(value)}")
    hints = get_type_hints(kind)
    arguments = {}
    for item in fields(kind):
        if item.name in value:
            arguments[item.name] = _value(hints[item.name], value[item.name], f"{where}: field {item.name!r}")
        elif item.default is MISSING:
            raise KalmaGroveError(f"{where}: field {item.name!r} is missing")
    return kind(**arguments)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(next(c for c in choices if c is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise KalmaGroveError(f"{where} must be a list, got {_shown(value)}")
        return tuple(_value(choices[0], item, f"{where}, item {index}") for index, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise KalmaGroveError(f"{where} must be an object, got {_shown(value)}")
        return {key: _value(choices[1], item, f"{where}, key {key!r}") for key, item in value.items()}
    if is_dataclass(hint):
        return _record(hint, value, where)
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is object:
        return value
    # True is an int to Python, but not a number to JSON.
    allowed = {float: (int, float), int: (int,), str: (str,), bool: (bool,)}[hint]
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        names = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
        raise KalmaGroveError(f"{where} must be {names[hint]}, got {_shown(value)}")
    if hint in (int, float):
        limit = LARGEST_NUMBER if hint is float else 1 << 63
        if not 0 <= typing.cast(float, value) <= limit:
            raise KalmaGroveError(f"{where} is negative, too large or not a number")
    return float(value) if hint is float else value


def _is_usable(value: float) -> bool:
    """Squares and ratios of such values are floats too."""
    return value == 0 or 1 / LARGEST_USABLE < value < LARGEST_USABLE


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
