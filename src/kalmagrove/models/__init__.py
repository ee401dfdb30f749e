"""One decoder, composed from parts, in the style of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalmagrove.models.config import KalmaGroveConfig
    from kalmagrove.models.decoder import KalmaGroveForCausalLM

__all__ = ["KalmaGroveConfig", "KalmaGroveForCausalLM"]


def __getattr__(name: str) -> Any:
    # Presets and choices stay importable without torch and transformers.
    if name == "KalmaGroveConfig":
        from kalmagrove.models.config import KalmaGroveConfig

        return KalmaGroveConfig
    if name == "KalmaGroveForCausalLM":
        from kalmagrove.models.decoder import KalmaGroveForCausalLM

        return KalmaGroveForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
