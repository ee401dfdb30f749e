"""Save training checkpoints that survive crashes, and load them only when every byte is as it was written.

A checkpoint is a folder `step-00000500` with `model.safetensors`, `optimizer.safetensors`, `state.json`
(everything that is not a tensor) and `manifest.json` (size and SHA-256 of the other three).
"""

import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalmagrove.errors import KalmaGroveError
from kalmagrove.files import fsync_file, fsync_folder, remove, rename_over, sha256_of, temporary_name
from kalmagrove.tensor_files import disk_errors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1

_MODEL = "model.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"
_MANIFEST = "manifest.json"
_CONTENT = (_MODEL, _OPTIMIZER, _STATE)
_REPLACED = ".replaced"
_CHECKPOINT_NAME = re.compile(r"step-(\d+)(\.replaced)?")
_TEMPORARY_NAME = re.compile(r"\.step-\d+(\.replaced)?\.tmp-.+")


class CheckpointError(KalmaGroveError):
    """A checkpoint is incomplete, damaged or of another format.

    Attributes:
        path: The checkpoint's folder.
        reason: Which of its files is wrong, and how.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"Checkpoint {path} cannot be used: {reason}; choose another checkpoint, or delete this one and train again"
        )
        self.path = path
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The verified content of one checkpoint, with every tensor on the CPU.

    Attributes:
        path: The folder it came from.
        step: How many optimiser steps had been done.
        model: The model's state; tied tensors are one object under several names.
        optimizer: What `Optimizer.state_dict()` gave, with the same types.
        progress: The caller's own JSON values.
    """

    path: Path
    step: int
    model: dict[str, "Tensor"]
    optimizer: dict[str, Any]
    progress: dict[str, Any]


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Mapping[str, "Tensor"],
    optimizer: Mapping[str, Any],
    progress: Mapping[str, Any],
    keep_last: int = 2,
    keep_steps: Collection[int] = frozenset(),
) -> Path:
    """Write one checkpoint completely before it gets its name, then remove the oldest.

    A step that is saved again replaces its checkpoint. Checkpoints of later steps are left alone.

    Args:
        folder: Where the checkpoints of one run lie; created when missing. One process may write to it at a time.
        step: How many optimiser steps have been done.
        model: Tensors by name, on any device; names that share one tensor are stored once.
        optimizer: A `torch.optim.Optimizer.state_dict()`: nested dicts, lists and tuples of tensors and plain values.
        progress: Any JSON values with string keys that a resumed run needs; tuples come back as lists.
        keep_last: How many checkpoints to keep, this one included, among those up to this step.
        keep_steps: Steps whose checkpoints stay beside those.

    Returns:
        The new checkpoint's folder.

    Raises:
        OSError: The disk is full or cannot be written; the earlier checkpoints are still there.
        TypeError: The optimiser's state or the progress holds a value that cannot be stored.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, not {keep_last}")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_temporaries(folder)
    final = checkpoint_path(folder, step)
    temporary = temporary_name(final)
    try:
        temporary.mkdir()
        _write_content(temporary, step, model, optimizer, progress)
        fsync_folder(temporary)
        _move_into_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder)
    prune(folder, step, keep_last, keep_steps)
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies in a run's folder of checkpoints."""
    return folder / f"step-{step:08d}"


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint after comparing the size and SHA-256 of each of its files with the manifest.

    Args:
        path: The checkpoint's own folder, such as `checkpoints/step-00000500`.

    Raises:
        CheckpointError: A file is missing, cut, changed, a symbolic link or unreadable, or the format is unknown.
    """
    with naming_checkpoint(path):
        step = _verify(path)
        state = json.loads((path / _STATE).read_bytes())
        model = _read_tensors(path / _MODEL, state["model_aliases"])
        optimizer_tensors = _read_tensors(path / _OPTIMIZER, state["optimizer_aliases"])
        optimizer = _decode(state["optimizer"], optimizer_tensors)
        if state["step"] != step:
            raise CheckpointError(path, f"{_MANIFEST} says step {step} and {_STATE} says step {state['step']}")
        named = _CHECKPOINT_NAME.fullmatch(path.name)
        if named is not None and int(named[1]) != step:
            raise CheckpointError(path, f"it holds step {step}, which is not that of its name")
        return Checkpoint(path=path, step=step, model=model, optimizer=optimizer, progress=dict(state["progress"]))


@contextmanager
def naming_checkpoint(path: Path) -> Iterator[None]:
    """Turns what goes wrong with a checkpoint's content, while it is read or used, into an error that names it.

    Raises:
        CheckpointError: The content cannot be read, or does not have the form that it should.
    """
    try:
        yield
    except KalmaGroveError:
        raise
    except OSError as error:
        raise CheckpointError(path, f"it cannot be read ({error.strerror or error})") from error
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError) as error:
        from kalmagrove.world import is_lost_connection

        if isinstance(error, RuntimeError) and is_lost_connection(error):
            raise
        reason = repr(error) if len(repr(error)) < 300 else repr(error)[:297] + "..."
        raise CheckpointError(path, f"its content does not have the checkpoint format ({reason})") from error


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest checkpoint that is whole.

    Args:
        folder: Where the checkpoints of one run lie; it may be missing.

    Returns:
        The checkpoint, or None where no whole one exists, and one line for each newer one that was passed over,
        with its name and what is wrong with it.
    """
    passed_over: list[str] = []
    for _, _, path in sorted(_named_checkpoints(folder), reverse=True):
        try:
            return load_checkpoint(path), passed_over
        except CheckpointError as error:
            passed_over.append(f"{path.name}: {error.reason}")
    return None, passed_over


def named_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a run's folder of checkpoints, sound or not, in order."""
    return sorted(step for step, has_own_name, _ in _named_checkpoints(folder) if has_own_name)


def _named_checkpoints(folder: Path) -> Iterator[tuple[int, bool, Path]]:
    """Yield (step, whether it holds its own name, path); one without its name was being replaced in a crash."""
    if folder.is_dir():
        for path in folder.iterdir():
            if match := _CHECKPOINT_NAME.fullmatch(path.name):
                yield int(match[1]), match[2] is None, path


def _remove_temporaries(folder: Path) -> None:
    for path in folder.iterdir():
        if _TEMPORARY_NAME.fullmatch(path.name):
            remove(path)


def _move_into_place(temporary: Path, final: Path) -> None:
    # The old one keeps a name under which it can be found meanwhile.
    replaced = final.with_name(final.name + _REPLACED)
    if os.path.lexists(final) and os.path.lexists(replaced):
        _remove_checkpoint(replaced)
    rename_over(temporary, final, aside=replaced)


def set_aside(folder: Path, names: Collection[str]) -> None:
    """Gives damaged checkpoints names under which they are not taken for checkpoints any more.

    Args:
        folder: Where the checkpoints of one run lie.
        names: Of the damaged ones.
    """
    for name in names:
        aside = folder / f"{name}.damaged"
        # What cannot be renamed stays; it is passed over again next time.
        with suppress(OSError):
            remove(aside)
            os.rename(folder / name, aside)


def prune(folder: Path, step: int, keep_last: int, keep_steps: Collection[int]) -> None:
    """Removes the checkpoints up to a step that need not be kept.

    Args:
        folder: Where the checkpoints of one run lie; it may be missing.
        step: Later ones are left alone.
        keep_last: As for `save_checkpoint`.
        keep_steps: As for `save_checkpoint`.
    """
    older = sorted((entry for entry in _named_checkpoints(folder) if entry[0] <= step), reverse=True)
    kept_steps = [entry_step for entry_step, has_own_name, _ in older if has_own_name][:keep_last]
    for entry_step, has_own_name, path in older:
        if not has_own_name or entry_step not in (*kept_steps, *keep_steps):
            _remove_checkpoint(path)


def _remove_checkpoint(path: Path) -> None:
    # Without its name first, so that a crash in between leaves no half checkpoint to be found.
    unnamed = path.with_name(f"{temporary_name(path).name}-removed")
    os.rename(path, unnamed)
    remove(unnamed)


def _write_content(
    folder: Path, step: int, model: Mapping[str, "Tensor"], optimizer: Mapping[str, Any], progress: Mapping[str, Any]
) -> None:
    optimizer_tensors: dict[str, Tensor] = {}
    skeleton = _encode(optimizer, "", optimizer_tensors)
    state = {
        "step": step,
        "model_aliases": _write_tensors(folder / _MODEL, model),
        "optimizer_aliases": _write_tensors(folder / _OPTIMIZER, optimizer_tensors),
        "optimizer": skeleton,
        "progress": dict(progress),
    }
    _write_json(folder / _STATE, state)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in _CONTENT}
    _write_json(folder / _MANIFEST, {"format_version": FORMAT_VERSION, "step": step, "files": files})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
    fsync_file(path)


def _write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> dict[str, str]:
    """Store each distinct tensor once and return the name it has for each further name."""
    from safetensors.torch import save_file

    from kalmagrove.training.nested import memory_of

    names_by_memory: dict[tuple[Any, ...], str] = {}
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        memory = memory_of(tensor)
        if tensor.numel() and memory in names_by_memory:
            aliases[name] = names_by_memory[memory]
        else:
            names_by_memory[memory] = name
            stored[name] = tensor
    with disk_errors(path):
        save_file(_without_shared_storage(stored), path)
    # The library makes the file private to its owner, unlike the others beside it.
    path.chmod(path.parent.stat().st_mode & 0o666)
    fsync_file(path)
    return aliases


def _without_shared_storage(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    import torch

    storages: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        on_cpu = tensor.detach().cpu()
        storage = on_cpu.untyped_storage()
        owns_storage = storage.nbytes() == on_cpu.numel() * on_cpu.element_size()
        if not (on_cpu.is_contiguous() and owns_storage) or storage.data_ptr() in storages:
            on_cpu = on_cpu.clone(memory_format=torch.contiguous_format)
        storages.add(on_cpu.untyped_storage().data_ptr())
        separate[name] = on_cpu
    return separate


def _read_tensors(path: Path, aliases: Mapping[str, str]) -> dict[str, "Tensor"]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned, since the file's own pages must not stay in use once the checkpoint is pruned.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise CheckpointError(path.parent, f"{path.name} is not a safetensors file ({str(error)[:300]!r})") from error
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def _encode(value: Any, name: str, tensors: dict[str, "Tensor"]) -> Any:
    """Return a JSON skeleton of nested values and collect their tensors; each container carries its type."""
    from torch import Tensor

    if isinstance(value, Tensor):
        unique = name
        while unique in tensors:
            unique += "'"
        tensors[unique] = value
        return {"tensor": unique}
    if isinstance(value, Mapping):
        return {
            "dict": [[_plain_key(key, name), _encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        }
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"The optimiser's state{name} is a {type(value).__name__}, which a checkpoint cannot hold")


def _plain_key(key: Any, name: str) -> Any:
    if isinstance(key, bool | int | str):
        return key
    raise TypeError(f"The optimiser's state{name} has the key {key!r}, which is neither a string nor an integer")


def _decode(skeleton: Any, tensors: Mapping[str, "Tensor"]) -> Any:
    if not isinstance(skeleton, dict):
        return skeleton
    [(kind, content)] = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    if kind == "float":
        return float(content)
    items = [_decode(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _verify(path: Path) -> int:
    """Compare a checkpoint with its manifest and return its step."""
    if not path.is_dir() or path.is_symlink():
        raise CheckpointError(path, "it is not a folder")
    manifest = _read_manifest(path)
    for name, listed in manifest["files"].items():
        file = _regular_file(path, name)
        size = file.stat().st_size
        if size != listed["bytes"]:
            change = "is cut" if size < listed["bytes"] else "has grown"
            raise CheckpointError(path, f"{name} {change}: it has {size} bytes, not {listed['bytes']}")
        if sha256_of(file) != listed["sha256"]:
            raise CheckpointError(path, f"{name} has changed since it was written (its SHA-256 differs)")
    step = manifest["step"]
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 53:
        raise CheckpointError(path, f"{_MANIFEST} has no sound step")
    return step


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_regular_file(path, _MANIFEST).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"{_MANIFEST} is cut or is not JSON") from error
    version = manifest["format_version"]
    if version != FORMAT_VERSION:
        raise CheckpointError(path, f"{_MANIFEST} has format version {version!r}, and only {FORMAT_VERSION} is known")
    for name in manifest["files"]:
        if Path(name).name != name or name in ("", "..") or "\\" in name:
            raise CheckpointError(path, f"{_MANIFEST} lists {name!r}, which leaves the checkpoint's folder")
    if sorted(manifest["files"]) != sorted(_CONTENT):
        raise CheckpointError(path, f"{_MANIFEST} does not list exactly {', '.join(_CONTENT)}")
    return manifest


def _regular_file(folder: Path, name: str) -> Path:
    file = folder / name
    if file.is_symlink():
        raise CheckpointError(folder, f"{name} is a symbolic link")
    if not file.is_file():
        raise CheckpointError(folder, f"{name} is missing")
    return file
