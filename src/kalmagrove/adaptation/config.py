"""What a run that adapts a model is configured by; no torch here, so that help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field

from kalmagrove.adaptors.options import AdaptorOptions
from kalmagrove.training.config import TrainConfig


@dataclass(frozen=True)
class BaseConfig:
    """The frozen model that an adaptor is trained over.

    Attributes:
        source: A run folder, a model folder or a Hub name.
        fingerprint: SHA-256 of its parameters, so that a run goes on over the same base only.
    """

    source: str
    fingerprint: str


@dataclass(frozen=True)
class AdaptConfig(TrainConfig):
    """Everything that the training of an adaptor depends on.

    Attributes:
        model: The base.
        adaptor: What is trained over it.
    """

    # A base in the place of a model that is made.
    model: BaseConfig = field(default_factory=lambda: BaseConfig("", ""))  # type: ignore[assignment]
    adaptor: AdaptorOptions = field(default_factory=lambda: AdaptorOptions("adaptor"))
