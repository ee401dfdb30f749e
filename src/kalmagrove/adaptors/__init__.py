"""Adaptors: small task cores over a frozen model, saved beside it, switched by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalmagrove.adaptors.adaptors import Adaptors
    from kalmagrove.adaptors.fingerprint import model_fingerprint
    from kalmagrove.adaptors.gradients import text_bases
    from kalmagrove.adaptors.opening import open_with_adaptor
    from kalmagrove.adaptors.storage import StoredAdaptor, load_adaptor, read_adaptor, save_adaptor

_HOMES = {
    "Adaptors": "kalmagrove.adaptors.adaptors",
    "StoredAdaptor": "kalmagrove.adaptors.storage",
    "load_adaptor": "kalmagrove.adaptors.storage",
    "model_fingerprint": "kalmagrove.adaptors.fingerprint",
    "open_with_adaptor": "kalmagrove.adaptors.opening",
    "read_adaptor": "kalmagrove.adaptors.storage",
    "save_adaptor": "kalmagrove.adaptors.storage",
    "text_bases": "kalmagrove.adaptors.gradients",
}
__all__ = [
    "Adaptors",
    "StoredAdaptor",
    "load_adaptor",
    "model_fingerprint",
    "open_with_adaptor",
    "read_adaptor",
    "save_adaptor",
    "text_bases",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kalmagrove.adaptors' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
