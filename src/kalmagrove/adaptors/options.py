"""What an adaptor is made by; no torch here, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kalmagrove.adaptors.naming import check_name
from kalmagrove.errors import UsageError

DEFAULT_RATES = {"gradient": 5e-4, "weights": 1e-2}
"""Peak learning rates of the cores by their bases, whose lengths differ."""


@dataclass(frozen=True)
class AdaptorOptions:
    """The adaptor that is trained.

    Attributes:
        name: Letters, digits, dots, dashes and underscores.
        rank: Directions of each layer; between the gradient's bases in the mean, more where the text pulls more.
        core: "diagonal" learns a number for each direction, "dense" one for each pair of them.
        bases: "gradient": the directions in which the text pulls at the frozen model, which the adaptor's file keeps;
            "weights": the singular directions of the model's own matrices, which any copy of it knows.
        gradient_tokens: Read before each round to find the gradient's directions.
        rounds: Parts of the training, each of which begins with ``rank`` more directions: where the text pulls at what
            was learned so far. Left out: 4 for diagonal cores between the gradient's bases, for which alone it is.
    """

    name: str
    rank: int = 8
    core: Literal["diagonal", "dense"] = "diagonal"
    bases: Literal["gradient", "weights"] = "gradient"
    gradient_tokens: int = 65536
    rounds: int | None = None

    def __post_init__(self) -> None:
        check_name(self.name)
        for name, choices in (("core", ("diagonal", "dense")), ("bases", ("gradient", "weights"))):
            if getattr(self, name) not in choices:
                raise UsageError(f"--{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")
        if self.rounds not in (None, 1) and not self._can_grow:
            raise UsageError("--rounds needs --core diagonal and --bases gradient")
        for name in ("rank", "gradient_tokens", "rounds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"--{name} must be at least 1, got {getattr(self, name)}")

    @property
    def _can_grow(self) -> bool:
        return (self.core, self.bases) == ("diagonal", "gradient")

    @property
    def number_of_rounds(self) -> int:
        """As given, or as is usual for such an adaptor."""
        return self.rounds if self.rounds is not None else (4 if self._can_grow else 1)
