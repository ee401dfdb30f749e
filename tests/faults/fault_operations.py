"""Numbers the file operations of an action, and lets the process die or the disk fail at any one of them."""

from __future__ import annotations

import builtins
import errno
import gc
import io
import os
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Action = Callable[[], object]

DEATHS = ("dies before", "dies in the middle of", "dies after")
ERRORS = {"disk is full at": errno.ENOSPC, "disk errs at": errno.EIO}
CALLS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "remove", "rmdir", "chmod", "ftruncate", "truncate")
DIED = 99
"""Exit code of a child that its fault ended."""

_truncate = os.truncate


@dataclass(frozen=True)
class Fault:
    """What happens at which operation, counted from 1; operation 0 never comes."""

    kind: str
    operation: int

    def __str__(self) -> str:
        return f"{self.kind} operation {self.operation}"


NONE = Fault("dies before", 0)


@dataclass(frozen=True)
class Ending:
    """How an action ended that was given a fault: by which error, if any, and after which operations."""

    died: bool
    error: str
    operations: tuple[str, ...]


def meet(action: Action, fault: Fault = NONE) -> Ending:
    """Does an action that meets a fault: in a forked child where it dies, else here.

    Args:
        action: Ends normally or with an OSError; what else it raises is raised.
        fault: What it meets.
    """
    if fault.kind not in ERRORS and fault.operation:
        return _die_in_child(action, fault)
    with _Disk(fault) as disk:
        error = ""
        try:
            action()
        except OSError as refused:
            error = str(refused)
    return Ending(False, error, tuple(disk.operations))


def faults_of(action: Action) -> list[Fault]:
    """Every fault that an action can meet; it is done once to learn its operations.

    The moment after an operation is the moment before the next, so only the last has its own death after it.
    """
    operations = meet(action).operations
    print("LEARNED", operations)
    found = []
    for number, operation in enumerate(operations, start=1):
        kinds = ["dies before", *ERRORS]
        if operation in ("write", "close", "save tensors"):
            kinds.append("dies in the middle of")
        if number == len(operations):
            kinds.append("dies after")
        found += [Fault(kind, number) for kind in kinds]
    return found


def fork() -> int:
    """As `os.fork`; the child must use no threads, of which later versions of Python warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _die_in_child(action: Action, fault: Fault) -> Ending:
    reader, writer = os.pipe()
    child = fork()
    if child == 0:
        _be_the_child(action, fault, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        *operations, error = pipe.read().decode().split("\0")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ending(code == DIED, error, tuple(operations))


def _be_the_child(action: Action, fault: Fault, pipe: int) -> None:
    # A collection would copy the memory that the child shares with its parent.
    gc.disable()
    try:
        disk = _Disk(fault, lambda operation: os.write(pipe, f"{operation}\0".encode()))
        with disk:
            action()
    except BaseException:
        os.write(pipe, traceback.format_exc().encode())
    finally:
        os._exit(0)


class _Disk:
    """Stands between Python and the disk while it is active."""

    def __init__(self, fault: Fault, note: Callable[[str], object] = lambda operation: None) -> None:
        self.fault, self.note = fault, note
        self.operations: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> _Disk:
        import safetensors.torch
        import transformers.modeling_utils

        for name in CALLS:
            self._patch.setattr(os, name, self._watched(name, getattr(os, name)))
        open_file, save_file = io.open, safetensors.torch.save_file
        for module in (io, builtins):
            self._patch.setattr(module, "open", lambda *given, **options: self._open(open_file, *given, **options))
        for module, name in ((safetensors.torch, "save_file"), (transformers.modeling_utils, "safe_save_file")):
            self._patch.setattr(module, name, lambda *given, **options: self._save(save_file, *given, **options))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def operate(self, name: str, do: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        """Does an operation, or meets the fault at it."""
        self.operations.append(name)
        self.note(name)
        if len(self.operations) != self.fault.operation:
            return do()
        kind = self.fault.kind
        if kind in ERRORS:
            half()
            raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))
        if kind == "dies in the middle of":
            half()
        if kind == "dies after":
            with suppress(OSError):
                do()
        os._exit(DIED)

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **options: Any) -> Any:
            return self.operate(name, lambda: call(*given, **options))

        return watched

    def _open(self, open_file: Callable[..., Any], file: Any, mode: str = "r", *given: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return open_file(file, mode, *given, **options)
        opened = self.operate("open for writing", lambda: open_file(file, mode, *given, **options))
        return _WatchedFile(opened, self)

    def _save(self, save_file: Callable[..., Any], tensors: Any, path: Any, *given: Any, **options: Any) -> Any:
        from safetensors import SafetensorError

        def half() -> None:
            save_file(tensors, path, *given, **options)
            _truncate(path, Path(path).stat().st_size // 2)

        try:
            self.operate("save tensors", lambda: save_file(tensors, path, *given, **options), half)
        except OSError as error:
            # As the library words what the system told it.
            raise SafetensorError(f"Error while serializing: I/O error: {error}") from None


class _WatchedFile:
    """A file that is open for writing."""

    def __init__(self, file: Any, disk: _Disk) -> None:
        self._file, self._disk = file, disk
        self._size = os.fstat(file.fileno()).st_size

    def write(self, content: Any) -> Any:
        def half() -> None:
            self._file.write(content[: len(content) // 2])
            self._file.flush()

        return self._disk.operate("write", lambda: self._file.write(content), half)

    def truncate(self, *given: Any) -> Any:
        return self._disk.operate("truncate", lambda: self._file.truncate(*given))

    def close(self) -> None:
        if self._file.closed:
            return

        def half() -> None:
            self._file.flush()
            size = os.fstat(self._file.fileno()).st_size
            _truncate(self._file.fileno(), self._size + (size - self._size) // 2)

        try:
            self._disk.operate("close", self._file.flush, half)
        finally:
            self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _WatchedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
