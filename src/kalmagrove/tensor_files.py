"""Tensors in files: what safetensors says of a disk is an error of the disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises what safetensors says about a file or folder that it cannot write as an OSError.

    The library hides the error number of a full disk in its own exception.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
