"""What the command asks for, checked; free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kalmagrove.errors import UsageError

LONGEST_CONTEXT = 1024
"""Tokens of a calibration window where the model could read more."""


@dataclass(frozen=True)
class CompressOptions:
    """Options of a compression.

    Attributes:
        source: A model folder, a run folder or a .gguf file.
        out: The new folder; it must not exist.
        keep: Part of all parameters that is kept, embeddings included, above 0 and at most 1.
        rank: Of every basis, in the place of ``keep``.
        target_ppl: Perplexity on the calibration text's validation part that is not passed, in the place of ``keep``.
        data: The calibration text; None is the built-in corpus.
        calibration_tokens: Of it.
        context_length: Tokens of a window; None is the model's context, at most 1,024.
        refit: How long all factors are trained afterwards, a duration or tokens; None is not at all.
        batch_size: Windows of a refit step.
        dense_out: A folder for the same function as a plain model of the source's architecture.
        seed: Of every draw.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: auto, bf16 or fp32, of the model's products.

    Raises:
        UsageError: Options are out of their ranges or exclude each other.
    """

    source: str
    out: Path
    keep: float | None = None
    rank: int | None = None
    target_ppl: float | None = None
    data: str | None = None
    calibration_tokens: int = 64_000
    context_length: int | None = None
    refit: str | None = None
    batch_size: int = 4
    dense_out: Path | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        given = [name for name in ("keep", "rank", "target_ppl") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                "give one of --keep, --rank and --target_ppl" + (f", not {' and '.join(given)}" if given else "")
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UsageError(f"--keep must be above 0 and at most 1, got {self.keep:g}")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--rank must be at least 1, got {self.rank}")
        if self.target_ppl is not None and not 1 < self.target_ppl < float("inf"):
            raise UsageError(f"--target_ppl must be above 1, got {self.target_ppl:g}")
        if self.context_length is not None and self.context_length < 2:
            raise UsageError(f"--context_length must be at least 2, got {self.context_length}")
        if self.batch_size < 1:
            raise UsageError(f"--batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be between 0 and 2**63, got {self.seed}")
        if self.rank == 1 and self.refit is not None:
            raise UsageError("--refit needs matrices to train, and --rank 1 leaves none; give a larger rank")
        if self.dense_out is not None:
            out, dense = self.out.resolve(), self.dense_out.resolve()
            if dense.is_relative_to(out) or dense.is_relative_to(self.work_path) or out.is_relative_to(dense):
                raise UsageError(
                    f"--dense_out {self.dense_out} and --out {self.out} are one folder, or one holds the other (or its "
                    f"work, {self.work_path.name}); choose folders beside each other"
                )

    @property
    def work_path(self) -> Path:
        """Where what is done is kept until the output is whole."""
        out = self.out.resolve()
        return out.with_name(f"{out.name}.work")
