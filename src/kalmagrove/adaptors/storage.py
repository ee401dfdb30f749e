"""An adaptor in a folder: its cores as safetensors, and its bases where they are its own; a JSON file says what for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kalmagrove.adaptors.adaptors import Adaptors, CoreForm
from kalmagrove.adaptors.bases import Bases
from kalmagrove.adaptors.fingerprint import model_fingerprint
from kalmagrove.adaptors.naming import check_name
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import fsync_file, whole_folder, write_json_atomic

FORMAT_VERSION = 1
ADAPTOR_FOLDER = "adaptor"
"""Of a run that trains one."""
DESCRIPTION, CORES = "adaptor.json", "adaptor.safetensors"
MOST_DESCRIPTION_BYTES = 1 << 20


@dataclass(frozen=True)
class StoredAdaptor:
    """An adaptor as its folder holds it.

    Attributes:
        folder: Where it lies.
        name: That it was given.
        rank: Largest side of a core.
        core: "dense" or "diagonal".
        base_fingerprint: Of the model that it is for, see `model_fingerprint`.
        facts: About its training: JSON values.
        cores: By the names of the layers, (rank, rank) or (rank,), float32.
        bases: U and V^T by the names of the layers; None where they are the weights'.
    """

    folder: Path
    name: str
    rank: int
    core: CoreForm
    base_fingerprint: str
    facts: dict[str, Any]
    cores: dict[str, Tensor]
    bases: dict[str, Bases] | None

    @property
    def parameters(self) -> int:
        """Numbers in the cores."""
        return sum(core.numel() for core in self.cores.values())


def save_adaptor(adaptors: Adaptors, name: str, folder: Path, *, facts: Mapping[str, Any] | None = None) -> None:
    """Writes an adaptor; a folder of that name is replaced once the new one is whole.

    Args:
        adaptors: Of the base model, with nothing merged.
        name: Of the adaptor.
        folder: Receives adaptor.safetensors and adaptor.json.
        facts: About its training: JSON values.

    Raises:
        UsageError: There is no adaptor of that name, or one is merged.
        KalmaGroveError: A core holds a number that is not finite.
        OSError: The folder cannot be written.
    """
    cores = {layer: core.detach().cpu().contiguous() for layer, core in adaptors.cores(name).items()}
    if adaptors.merged is not None:
        raise UsageError(f"adaptor {adaptors.merged!r} is merged into the weights; unmerge it first")
    if not all(bool(core.isfinite().all()) for core in cores.values()):
        raise KalmaGroveError(f"adaptor {name!r} has numbers that are not finite; train it again with a lower rate")
    tensors = {f"{layer}.core": core for layer, core in cores.items()}
    for layer, bases in (adaptors.own_bases(name) or {}).items():
        tensors |= {f"{layer}.{side}": _compact(basis) for side, basis in zip(("left", "right"), bases, strict=True)}
    content = save(tensors)
    description = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "rank": max(len(core) for core in cores.values()),
        "core": "diagonal" if all(core.ndim == 1 for core in cores.values()) else "dense",
        "bases": "weights" if adaptors.own_bases(name) is None else "own",
        "parameters": sum(core.numel() for core in cores.values()),
        "base_fingerprint": model_fingerprint(adaptors.model),
        "sha256": hashlib.sha256(content).hexdigest(),
        "facts": dict(facts or {}),
    }
    with whole_folder(folder) as temporary:
        (temporary / CORES).write_bytes(content)
        fsync_file(temporary / CORES)
        write_json_atomic(temporary / DESCRIPTION, description)


def load_adaptor(adaptors: Adaptors, folder: Path, *, name: str | None = None) -> str:
    """Adds an adaptor from its folder.

    Args:
        adaptors: Of the base that it was made for.
        folder: As `save_adaptor` wrote it.
        name: To have here; None is the name that it was saved with.

    Returns:
        Its name.

    Raises:
        KalmaGroveError: It was made for another base, or a file is missing, damaged or no adaptor's.
        UsageError: The name is taken.
    """
    stored = read_adaptor(folder)
    if stored.base_fingerprint != model_fingerprint(adaptors.model):
        raise KalmaGroveError(f"{folder} was trained over another base model; give that one")
    chosen = stored.name if name is None else name
    cores = adaptors.add_adaptor(chosen, stored.rank, core=stored.core, bases=stored.bases)
    try:
        _fill(cores, stored)
    except BaseException:
        adaptors.remove_adaptor(chosen)
        raise
    return chosen


def _fill(cores: Mapping[str, torch.nn.Parameter], stored: StoredAdaptor) -> None:
    wrong = sorted(set(cores) ^ set(stored.cores))
    wrong += [name for name in sorted(set(cores) & set(stored.cores)) if cores[name].shape != stored.cores[name].shape]
    if wrong:
        raise KalmaGroveError(f"{stored.folder / CORES} does not fit the model's layer {wrong[0]}; train it again")
    with torch.no_grad():
        for layer, core in cores.items():
            core.copy_(stored.cores[layer])


def read_adaptor(folder: Path) -> StoredAdaptor:
    """Reads an adaptor's folder and checks that it is as it was written.

    Raises:
        KalmaGroveError: A file is missing, damaged or no adaptor's.
    """
    description, content = _description_of(folder), _content_of(folder / CORES)
    if hashlib.sha256(content).hexdigest() != description["sha256"]:
        raise KalmaGroveError(f"{folder / CORES} has changed since it was written; put it back from a copy")
    try:
        tensors = {name: tensor.float() for name, tensor in load(content).items()}
    except SafetensorError as error:
        raise KalmaGroveError(f"{folder / CORES} is not a safetensors file; put it back from a copy") from error
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise KalmaGroveError(f"{folder / CORES} holds numbers that are not finite; train it again")
    cores = {name.removesuffix(".core"): tensor for name, tensor in tensors.items() if name.endswith(".core")}
    form, rank = description["core"], description["rank"]
    sides = [core.shape[0] if core.ndim else 0 for core in cores.values()]
    axes = 2 if form == "dense" else 1
    has_form = all(core.shape == (side,) * axes for core, side in zip(cores.values(), sides, strict=True))
    if not cores or not has_form or max(sides) != rank:
        raise KalmaGroveError(f"{folder / CORES} does not hold {form} cores of rank {rank}; train it again")
    sides_of = ("core", "left", "right") if description["bases"] == "own" else ("core",)
    if set(tensors) != {f"{layer}.{side}" for layer in cores for side in sides_of}:
        raise KalmaGroveError(f"{folder / CORES} lacks tensors of an adaptor, or has others; put it back from a copy")
    bases = None
    if description["bases"] == "own":
        bases = {layer: (tensors[f"{layer}.left"], tensors[f"{layer}.right"]) for layer in cores}
    described = (description["name"], rank, form, description["base_fingerprint"], description["facts"])
    return StoredAdaptor(folder, *described, cores, bases)


def is_adaptor_folder(folder: Path) -> bool:
    """Whether a folder is an adaptor's, to look at: `read_adaptor` examines it."""
    return (folder / DESCRIPTION).is_file()


def _description_of(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise KalmaGroveError(f"{folder} holds no {DESCRIPTION}; give the folder of an adaptor")
    if path.stat().st_size > MOST_DESCRIPTION_BYTES:
        raise KalmaGroveError(f"{path} is too large for an adaptor's; put it back from a copy")
    try:
        found = json.loads(path.read_bytes())
        version, rank = found["format_version"], found["rank"]
        texts = [found["name"], found["base_fingerprint"], found["sha256"]]
        is_sound = all(isinstance(text, str) for text in texts) and isinstance(found["facts"], dict)
        is_sound &= found["core"] in ("dense", "diagonal") and found["bases"] in ("weights", "own")
        is_sound &= isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise KalmaGroveError(f"{path} is not an adaptor's description; put it back from a copy") from error
    if version != FORMAT_VERSION:
        raise KalmaGroveError(f"{path} has format version {version!r}, and only {FORMAT_VERSION} is known")
    if not is_sound:
        raise KalmaGroveError(f"{path} is not an adaptor's description; put it back from a copy")
    check_name(found["name"])
    return dict(found)


def _compact(basis: Tensor) -> Tensor:
    """In bfloat16 where that is exact."""
    short = basis.detach().cpu().to(torch.bfloat16)
    return (short if torch.equal(short.float(), basis.detach().cpu()) else basis.detach().cpu()).contiguous()


def _content_of(path: Path) -> bytes:
    if not path.is_file():
        raise KalmaGroveError(f"{path} is missing; put it back from a copy")
    return path.read_bytes()
