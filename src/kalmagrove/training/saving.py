"""Write a run's checkpoints without holding up its training."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kalmagrove.training.checkpoint import save_checkpoint
from kalmagrove.training.nested import map_tensors, memory_of


class CheckpointWriter:
    """Writes checkpoints into one folder, one after the other.

    Args:
        folder: Where the checkpoints of one run lie.
        asynchronous: Whether a thread writes what was copied before `save` returns, while the run goes on.
    """

    def __init__(self, folder: Path, *, asynchronous: bool) -> None:
        self._folder, self._asynchronous = folder, asynchronous
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, state: Mapping[str, Any], *, step: int, keep_last: int, keep_steps: Collection[int] = frozenset()
    ) -> None:
        """Writes a checkpoint, or begins to; an earlier one is on the disk by then.

        Args:
            state: ``model``, ``optimizer`` and ``progress``, as `save_checkpoint` takes them.
            step: How many optimiser steps had been done.
            keep_last: As for `save_checkpoint`.
            keep_steps: As for `save_checkpoint`.

        Raises:
            OSError: This or the earlier checkpoint could not be written.
        """
        self.wait()
        if not self._asynchronous:
            save_checkpoint(self._folder, step=step, keep_last=keep_last, keep_steps=keep_steps, **state)
            return
        copied = copy_to_cpu(state)
        self._thread = threading.Thread(
            target=self._write, args=(copied, step, keep_last, keep_steps), name="checkpoint writer", daemon=True
        )
        self._thread.start()

    def _write(self, state: Mapping[str, Any], step: int, keep_last: int, keep_steps: Collection[int]) -> None:
        try:
            save_checkpoint(self._folder, step=step, keep_last=keep_last, keep_steps=keep_steps, **state)
        except BaseException as error:  # Handed to the thread that trains.
            self._error = error

    def wait(self) -> None:
        """Returns when what was begun is on the disk.

        Raises:
            OSError: It could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


def copy_to_cpu(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples that later steps do not change; tied tensors stay tied."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        memory = memory_of(tensor)
        if tensor.numel() == 0 or memory not in copies:
            copies[memory] = tensor.detach().to("cpu", copy=True)
        return copies[memory]

    return map_tensors(value, copied)
