"""The dataclasses that YAML files and flags fill: one tree, checked before anything starts."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypedDict, TypeVar, get_args

from kalmagrove.data.images.choices import Learns, Scan
from kalmagrove.data.synthetic.options import is_synthetic, parse_synthetic
from kalmagrove.errors import UsageError
from kalmagrove.models.choices import (
    Attention,
    CoreKind,
    FeedForwardKind,
    GroveParts,
    Norm,
    Positions,
    Projections,
    SharedSides,
    Sharing,
)
from kalmagrove.models.presets import PARTS, split_parts, split_preset
from kalmagrove.quantities import parse_count, parse_duration

OptimizerName = Literal["kalma", "adamw", "muon", "soap"]
Config = TypeVar("Config")
Schedule = Literal["linear", "cosine", "wsd", "constant"]
PrecisionChoice = Literal["auto", "bf16", "fp32"]
Parallel = Literal["ddp", "fsdp"]
ModalityName = Literal["text", "table", "image", "mixed"]
TrackerName = Literal["tensorboard", "trackio"]

BASELINE_FAMILIES = ("gpt2", "llama")
"""Architectures that are what the others are compared with, trained as is usual."""


_OF_MODALITY = {
    "image": ("patch_size", "scan", "image_size", "learns"),
    "table": ("bins",),
    "mixed": ("patch_size", "scan", "image_size", "bins"),
}

USUAL_VOCABULARY = {"text": 4096, "image": 1024, "table": 1024, "mixed": 1024}

_VOCABULARY_OF = {"image": "caption_vocab_size", "table": "text_vocab_size", "mixed": "vocab_size"}
"""What their sources call the vocabulary of the texts in them."""


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens.

    Attributes:
        source: A file, a folder, a Hub data set with its config (wikitext:wikitext-103-raw-v1), or a synthetic task
            whose best possible loss is known (synthetic:markov,states=64 or synthetic:recall,pairs=8). Left out: the
            built-in corpus, the source files of the running Python's standard library.
        vocab_size: Vocabulary of the byte-level BPE that is trained on the training split; left out: 4,096 for text,
            and 1,024 for a table's texts, captions and mixed lines.
        tokenizer: A tokenizer.json, a folder that holds one, or a Hub name, in the place of a trained one.
        seed: Divides documents into train, valid and test where the source has no splits.
        folder: Where packed token files are kept.
        modality: text; table, the rows of a CSV, Parquet or JSONL file; image, a folder of pictures, a JSONL with their
            paths, or an .npz of arrays; or mixed, a JSONL whose lines mix text, images and rows.
        patch_size: Pixels of a patch's side, of images; left out: chosen by their size.
        scan: The order of an image's patches: z-order, so that neighbouring patches make square blocks, or raster.
        image_size: Pixels that every image is scaled and cut to, such as 32 or 32x48 (height x width); left out: all
            images have one size already.
        learns: Of images, all: pixels, labels and captions; or the labels alone.
        bins: Of tables, most bins that a number is predicted as.
    """

    source: str | None = None
    vocab_size: int | None = None
    tokenizer: str | None = None
    seed: int = 0
    folder: str = "runs/data"
    modality: ModalityName = "text"
    patch_size: int | None = None
    scan: Scan = "z-order"
    image_size: str | None = None
    learns: Learns = "all"
    bins: int = 64

    def __post_init__(self) -> None:
        self._check_modality()
        if self.vocab_size is None:
            object.__setattr__(self, "vocab_size", USUAL_VOCABULARY[self.modality])
        assert self.vocab_size is not None
        if self.tokenizer is None and self.vocab_size < 258:
            raise UsageError(f"data.vocab_size must be at least 258 (256 bytes and two more), got {self.vocab_size}")
        if is_synthetic(self.source):
            parse_synthetic(self.source)

    def _check_modality(self) -> None:
        for name in sorted({name for names in _OF_MODALITY.values() for name in names}):
            takers = [modality for modality, names in _OF_MODALITY.items() if name in names]
            if self.modality not in takers and getattr(self, name) != getattr(type(self), name):
                raise UsageError(f"data.{name} is for data.modality {' or '.join(takers)}; leave it out")
        if self.modality == "text":
            return
        if self.source is None or is_synthetic(self.source):
            raise UsageError(f"data.modality {self.modality} needs data.source, a file or a folder")
        if self.tokenizer is not None:
            raise UsageError(f"data.modality {self.modality} makes its own tokenizer; leave data.tokenizer out")

    def modality_options(self) -> dict[str, Any]:
        """What the source of examples takes, apart from where it is."""
        options = {name: getattr(self, name) for name in _OF_MODALITY.get(self.modality, ())}
        if self.modality != "text":
            options[_VOCABULARY_OF[self.modality]] = self.vocab_size
        return options


@dataclass(frozen=True)
class ModelConfig:
    """A preset, and options that replace the preset's where they are given.

    Attributes:
        preset: A family (gpt2, llama, llama-plus, slim, kalmagrove) or family-size (llama-small), with grove or arnold
            put into it behind a plus sign (llama-small+grove).
        hidden_size: Width of the residual stream.
        num_hidden_layers: Layers.
        num_attention_heads: Heads of full attention.
        head_dim: Size of a head.
        intermediate_size: Hidden units of the feed-forward.
        norm: Norm of every layer.
        feed_forward: Non-linearity and number of matrices of the feed-forward.
        positions: Rotary or learned.
        attention: Full, or Arnold's several resolutions.
        resolutions: Arnold's groups of heads: a list of num_heads, head_dim and scales, pairs (stride, reach).
        projections: Dense, or Grove's shared bases.
        grove_parts: The parts of a layer whose projections are Grove's; the others are dense.
        rank: Grove's inner size; left out is full rank.
        group_size: Layers that share one of Grove's bases.
        sharing: Disjoint groups of neighbours, the bases in cycles, a mixture of all, or overlapping bands of one bank.
        shared_sides: Which of Grove's bases are shared.
        core: Form of Grove's Sigma.
        core_block_size: Side of a block of a block-diagonal core.
        qk_norm: Normalise queries and keys.
        short_conv: Taps of the causal convolution on keys and values; 0 is none.
        document_mask: Whether tokens see only their own document.
        value_residual: Mix the first layer's values into later layers.
        embedding_residual: Mix the token embedding into every layer's input.
        embedding_rank: Inner size of a factorised embedding; left out is one full table.
        tie_word_embeddings: Use the token embedding as the output head.
    """

    preset: str = "kalmagrove"
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    norm: Norm | None = None
    feed_forward: FeedForwardKind | None = None
    positions: Positions | None = None
    attention: Attention | None = None
    resolutions: list[dict[str, Any]] | None = None
    projections: Projections | None = None
    grove_parts: GroveParts | None = None
    rank: int | None = None
    group_size: int | None = None
    sharing: Sharing | None = None
    shared_sides: SharedSides | None = None
    core: CoreKind | None = None
    core_block_size: int | None = None
    qk_norm: bool | None = None
    short_conv: int | None = None
    document_mask: bool | None = None
    value_residual: bool | None = None
    embedding_residual: bool | None = None
    embedding_rank: int | None = None
    tie_word_embeddings: bool | None = None

    def overrides(self) -> dict[str, Any]:
        """The options that were given."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "preset"}
        return {name: value for name, value in given.items() if value is not None}


# The best of four rates for each at 1.7 million parameters and 2 k tokens a step: docs/results/optimizers.md.
_DEFAULT_LR: dict[str, float] = {"kalma": 3e-3, "muon": 1e-2, "soap": 3e-3, "adamw": 1.5e-3}

_RANGES = (
    ("auxiliary_lr", 0.0, 10.0),
    ("core_lr", 0.0, 10.0),
    ("weight_decay", 0.0, 10.0),
    ("momentum", 0.0, 1.0),
    ("beta1", 0.0, 1.0),
    ("beta2", 0.0, 1.0),
    ("refresh_every", 1, 1_000_000),
)


class PeakRates(TypedDict):
    """Learning rates: of the hidden matrices, of embeddings, head and vectors, and of Grove's cores."""

    lr: float
    auxiliary_lr: float
    core_lr: float


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser and its schedule.

    Attributes:
        name: kalma, muon (torch's) or soap (pytorch-optimizer's, extra "soap") for the matrices and AdamW for the
            rest; or adamw for all.
        lr: Peak learning rate of the hidden matrices. Left out: 3e-3 for kalma and soap, 1e-2 for muon, 1.5e-3 for
            adamw.
        lr_scale: Multiplies every learning rate.
        auxiliary_lr: Peak learning rate of embeddings, head and vectors.
        core_lr: Peak learning rate of Grove's diagonal and block-diagonal cores.
        weight_decay: Decoupled decay of the matrices.
        momentum: Of kalma and muon.
        damping: Of Kalma's P, relative to the mean input power.
        refresh_every: Steps between refreshes of Kalma's P.
        beta1: AdamW's.
        beta2: AdamW's.
        schedule: Shape after the warm-up.
        warmup: Part of the steps that the learning rate rises over. Left out: 0.02 for muon, 0.1 for the others.
        grad_clip: Largest norm of the gradient; 0 is no clipping.
    """

    name: OptimizerName = "kalma"
    lr: float | None = None
    lr_scale: float = 1.0
    auxiliary_lr: float = 2e-2
    core_lr: float = 2e-3
    weight_decay: float = 0.1
    momentum: float = 0.9
    damping: float = 0.1
    refresh_every: int = 10
    beta1: float = 0.9
    beta2: float = 0.95
    schedule: Schedule = "linear"
    warmup: float | None = None
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) < high:
                raise UsageError(f"optim.{name} must be at least {low} and below {high}, got {getattr(self, name)}")
        if self.damping <= 0:
            raise UsageError(f"optim.damping must be positive, got {self.damping}")
        if self.lr is not None and not 0 < self.lr < 10:
            raise UsageError(f"optim.lr must be between 0 and 10, got {self.lr}")
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise UsageError(f"optim.warmup is a part of the run between 0 and 1, got {self.warmup}")
        if not 0 < self.lr_scale <= 100:
            raise UsageError(f"optim.lr_scale must be between 0 and 100, got {self.lr_scale}")
        if not self.grad_clip >= 0:
            raise UsageError(f"optim.grad_clip must be 0 (none) or positive, got {self.grad_clip}")

    def peak_rates(self) -> PeakRates:
        """Peak learning rates of every kind of parameter."""
        lr, scale = _DEFAULT_LR[self.name] if self.lr is None else self.lr, self.lr_scale
        return {"lr": scale * lr, "auxiliary_lr": scale * self.auxiliary_lr, "core_lr": scale * self.core_lr}

    @property
    def warmup_part(self) -> float:
        """Part of the run that is warm-up."""
        return self.warmup if self.warmup is not None else (0.02 if self.name == "muon" else 0.1)


@dataclass(frozen=True)
class LoopConfig:
    """How long and in which portions a model is trained.

    Attributes:
        tokens: Training tokens, e.g. 2m.
        batch_size: Sequences of an optimiser step.
        context_length: Tokens of a sequence.
        micro_batch_size: Sequences of one forward; smaller than batch_size accumulates gradients and saves memory.
        seed: Of the initial weights and the order of the batches.
        precision: bf16 autocast, fp32, or auto: bf16 where the hardware has it.
        device: auto, cpu, cuda, cuda:N or mps.
        log_every: Steps between lines of metrics.jsonl.
        gradient_metrics: Write update_ratio and gradient_noise_scale with the metrics, at the price of another forward
            and backward each time.
        eval_every: Steps between evaluations on a part of the validation split; 0 is 10 in the whole run.
        save_every: Steps between checkpoints, or the time between them, such as 10m.
        save_in_background: Write checkpoints from a copy in memory while the training goes on.
        keep_last: Newest checkpoints that are kept.
        keep_best: Checkpoints that are kept for the lowest loss of their evaluations, beside the newest.
        parallel: With several processes: ddp, each has the whole model; or fsdp, each has a part.
        compile: Train with torch.compile (torch 2.13 or newer), which takes minutes at the start; steps in which Kalma
            looks at the inputs are not compiled.
        activation_checkpointing: Make a layer's activations again in the backward, for less memory and more time.
        grow_rank: New ranks of Grove's projections by the step that they come before, e.g. {500: 64}.
    """

    tokens: int | float | str = "2m"
    batch_size: int = 16
    context_length: int = 256
    micro_batch_size: int | None = None
    seed: int = 0
    precision: PrecisionChoice = "auto"
    device: str = "auto"
    log_every: int = 10
    gradient_metrics: bool = False
    eval_every: int = 0
    save_every: int | str = 250
    save_in_background: bool = True
    keep_last: int = 2
    keep_best: int = 0
    parallel: Parallel = "ddp"
    compile: bool = False
    activation_checkpointing: bool = False
    grow_rank: dict[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "context_length", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise UsageError(f"loop.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seed", "eval_every", "keep_best"):
            if getattr(self, name) < 0:
                raise UsageError(f"loop.{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise UsageError(f"loop.seed must be below 2**63, got {self.seed}")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise UsageError(
                f"loop.micro_batch_size {self.micro_batch_size} does not divide loop.batch_size {self.batch_size}"
            )
        if (self.save_steps or self.save_seconds or 0) <= 0:
            raise UsageError(f"loop.save_every must be at least one step or more than no time, got {self.save_every}")
        if self.total_steps < 1:
            raise UsageError(
                f"loop.tokens {self.tokens} is less than one batch of {self.tokens_per_step} tokens "
                f"({self.batch_size} x {self.context_length})"
            )
        if self.grow_rank is not None:
            # A file of options keeps the steps as texts.
            object.__setattr__(self, "grow_rank", {int(step): rank for step, rank in self.grow_rank.items()})
        for step in self.grow_rank or {}:
            if not 0 < step < self.total_steps:
                raise UsageError(f"loop.grow_rank names step {step}, but the run has steps 1 to {self.total_steps - 1}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimiser step."""
        return self.batch_size * self.context_length

    @property
    def save_steps(self) -> int | None:
        """Steps between checkpoints, None where a time is given."""
        return int(self.save_every) if str(self.save_every).isdecimal() else None

    @property
    def save_seconds(self) -> float | None:
        """Seconds between checkpoints, None where a number of steps is given."""
        return None if self.save_steps is not None else parse_duration(str(self.save_every))

    @property
    def total_steps(self) -> int:
        """Whole optimiser steps that the tokens are enough for."""
        return parse_count(self.tokens) // self.tokens_per_step


NEUTRAL_OPTIONS = frozenset(
    {
        "loop.log_every",
        "loop.gradient_metrics",
        "loop.save_every",
        "loop.save_in_background",
        "loop.keep_last",
        "loop.keep_best",
        "loop.micro_batch_size",
        "loop.parallel",
        "loop.compile",
        "loop.activation_checkpointing",
        "loop.device",
        "data.folder",
        "track",
    }
)
"""Options that change how a run is done but not what is computed, up to rounding, so that it may go on with others."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on, and how it is watched.

    Attributes:
        data: The text.
        model: The preset and what replaces it.
        optim: The optimiser and its schedule.
        loop: Length and portions.
        track: Keep the metrics for this tool too, in the run folder; metrics.jsonl is always written.
        energy: Count the electricity of the run with codecarbon.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    track: TrackerName | None = None
    energy: bool = False


def config_of(kind: type[Config], options: Any) -> Config:
    """The fields of a configuration, a dataclass, from built options, which may have others too."""
    assert is_dataclass(kind)
    return kind(**{item.name: getattr(options, item.name) for item in fields(kind)})


def plain_options(config: Any) -> dict[str, Any]:
    """A configuration as nested dictionaries, with numbers of tokens written out: 2m and 2000000 are the same."""
    options = asdict(config)
    options["loop"]["tokens"] = parse_count(options["loop"]["tokens"])
    return options


def usual_options(config: Any) -> dict[str, Any]:
    """The values that a configuration's options have when nothing is said, as nested dictionaries."""
    usual: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            usual[item.name] = usual_options(value)
        elif item.default is not MISSING:
            usual[item.name] = item.default
    return usual


def is_plain_transformer(preset: str) -> bool:
    """Whether a preset is an architecture that the others are compared with, with nothing of ours put into it."""
    return split_preset(preset)[0] in BASELINE_FAMILIES and not split_parts(preset)[1]


def default_optimizer(family: str) -> OptimizerName:
    """The optimiser of an architecture where none is named."""
    return "adamw" if family in BASELINE_FAMILIES else "kalma"


def is_usual_transformer(preset: str, optim: str) -> bool:
    """Whether a model is a plain Transformer with its usual optimiser, of which the better one is the reference."""
    return is_plain_transformer(preset) and optim == default_optimizer(split_preset(preset)[0])


def split_optimizer(text: str) -> tuple[str, OptimizerName | None]:
    """A preset with its parts, and the optimiser where one stands among them behind a plus sign.

    Raises:
        UsageError: There are two optimisers, or something stands there that is neither a part nor an optimiser.
    """
    preset, *behind = text.split("+")
    optims: list[OptimizerName] = [known for name in behind for known in get_args(OptimizerName) if known == name]
    parts = [name for name in behind if name not in get_args(OptimizerName)]
    unknown = next((part for part in parts if part not in PARTS), None)
    if unknown is not None:
        known_names = f"parts: {', '.join(PARTS)}; optimisers: {', '.join(get_args(OptimizerName))}"
        raise UsageError(f"{unknown!r} in {text} is neither a part nor an optimiser; {known_names}")
    if len(optims) > 1:
        raise UsageError(f"{text} names more than one optimiser")
    return "+".join([preset, *parts]), optims[0] if optims else None
