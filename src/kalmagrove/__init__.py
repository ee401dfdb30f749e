"""KalmaGrove: train language models cheaply.

Three parts, each usable alone: Grove (shared-basis weights), Kalma (a Kalman-filter optimiser) and Arnold
(multi-resolution causal attention). Heavy libraries are imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kalmagrove.auto_classes import register_when_imported

if TYPE_CHECKING:
    from kalmagrove.models.config import KalmaGroveConfig
    from kalmagrove.models.decoder import KalmaGroveForCausalLM
    from kalmagrove.nn.arnold import MultiResolutionAttention
    from kalmagrove.nn.grove import GroveLinear
    from kalmagrove.nn.resolution import Resolution
    from kalmagrove.optim.groups import kalma_groups
    from kalmagrove.optim.kalma import Kalma

__version__ = "0.1.0"

_HOMES = {
    "GroveLinear": "kalmagrove.nn.grove",
    "Kalma": "kalmagrove.optim.kalma",
    "KalmaGroveConfig": "kalmagrove.models.config",
    "KalmaGroveForCausalLM": "kalmagrove.models.decoder",
    "MultiResolutionAttention": "kalmagrove.nn.arnold",
    "Resolution": "kalmagrove.nn.resolution",
    "kalma_groups": "kalmagrove.optim.groups",
}
__all__ = [
    "GroveLinear",
    "Kalma",
    "KalmaGroveConfig",
    "KalmaGroveForCausalLM",
    "MultiResolutionAttention",
    "Resolution",
    "__version__",
    "kalma_groups",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kalmagrove' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


register_when_imported()
