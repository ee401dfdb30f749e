"""The sources of examples by modality, from a configuration's options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kalmagrove.data.examples import ExampleSource
from kalmagrove.data.packing import Progress
from kalmagrove.errors import UsageError


def example_source(
    modality: str, path: str, *, seed: int, options: Mapping[str, Any], progress: Progress | None = None
) -> ExampleSource:
    """Tables, images or both, ready to be packed.

    Args:
        modality: table, image or mixed.
        path: A file or a folder.
        seed: Divides what has no splits.
        options: Of the modality; what is left out has its usual value.
        progress: Called now and then with ``"reading"`` and the bytes of pixels that were read.

    Raises:
        UsageError: The modality does not take an option.
        KalmaGroveError: The source cannot be read.
    """
    if modality == "table":
        from kalmagrove.data.tables.source import table_source

        return table_source(path, seed=seed, **options)
    if modality == "image":
        from kalmagrove.data.images.source import image_source

        return image_source(path, seed=seed, progress=progress, **options)
    if modality == "mixed":
        from kalmagrove.data.mixed.source import mixed_source

        return mixed_source(path, seed=seed, progress=progress, **options)
    raise UsageError(f"--data.modality must be text, table, image or mixed, got {modality!r}")


def default_examples_folder(modality: str, path: str, seed: int, options: Mapping[str, Any], root: Path) -> Path:
    """A readable folder name that is the same for the same choices, such as ``root/iris-table-1a2b3c4d``."""
    source = Path(path).expanduser().resolve()
    choices = json.dumps([modality, str(source), seed, dict(options)], sort_keys=True)
    name = source.name.split(".")[0] or modality
    return root / f"{name}-{modality}-{hashlib.sha256(choices.encode()).hexdigest()[:8]}"
