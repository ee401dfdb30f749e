"""Modalities by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kalmagrove.modalities.modality import Modality
from kalmagrove.modalities.number import NumberModality
from kalmagrove.modalities.patch import PatchModality

MODALITIES: dict[str, type[Modality]] = {"number": NumberModality, "patch": PatchModality}
"""Their encoders and heads; images alone are laid out in two dimensions, which the store of examples knows."""


def make_modality(name: str, hidden_size: int, options: Mapping[str, Any]) -> Modality:
    """The encoder and head of a configuration.

    Args:
        name: Of the modality.
        hidden_size: Width of the decoder.
        options: ``placeholder``, and what else the modality takes.

    Raises:
        ValueError: The name or an option is unknown.
    """
    if name not in MODALITIES:
        raise ValueError(f"unknown modality {name!r}; known: {', '.join(MODALITIES)}")
    try:
        return MODALITIES[name](hidden_size, **options)
    except TypeError as error:
        raise ValueError(f"modality {name}: {error}") from error
