"""Packages that only some runs need."""

from __future__ import annotations

import importlib.util

from kalmagrove.errors import UsageError


def require_extra(module: str, extra: str, option: str) -> None:
    """Looks for a package without importing it, so that the check is quick.

    Args:
        module: What would be imported.
        extra: The group of optional dependencies of this package that installs it.
        option: What asks for it.

    Raises:
        UsageError: It is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise UsageError(f"{option} needs {module}; install it with: pip install 'kalmagrove[{extra}]'")
