"""A model from a preset and a seed."""

from __future__ import annotations

from typing import Any

import torch

from kalmagrove.errors import UsageError
from kalmagrove.models.config import KalmaGroveConfig
from kalmagrove.models.decoder import KalmaGroveForCausalLM
from kalmagrove.models.presets import preset_options


def model_config(preset: str, overrides: dict[str, Any] | None = None, **special_tokens: Any) -> KalmaGroveConfig:
    """The configuration of a preset with overrides.

    Raises:
        UsageError: The preset is unknown, an option is unknown, or the options do not fit together.
    """
    options = preset_options(preset, overrides)
    try:
        return KalmaGroveConfig(**options, **special_tokens)
    except (TypeError, ValueError) as error:
        raise UsageError(f"model: {error}") from error


def build_model(config: KalmaGroveConfig, seed: int) -> KalmaGroveForCausalLM:
    """A model with initial weights that depend on the seed alone; the global random state is not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KalmaGroveForCausalLM(config)
