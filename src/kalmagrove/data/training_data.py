"""What models are trained on: packed text, or packed examples of tables and images."""

from __future__ import annotations

from pathlib import Path

from kalmagrove.data.example_store import PackedExamples, holds_examples, open_examples
from kalmagrove.data.packing import PackedText, is_packed, open_packed

TrainingData = PackedText | PackedExamples


def is_training_data(folder: Path) -> bool:
    """Whether this is a folder that was packed, to look at: `open_training_data` examines it."""
    return holds_examples(folder) or is_packed(folder)


def open_training_data(folder: Path, *, verify: bool = True) -> TrainingData:
    """Opens a packed folder.

    Raises:
        KalmaGroveError: It is missing or damaged.
    """
    return open_examples(folder, verify=verify) if holds_examples(folder) else open_packed(folder, verify=verify)
