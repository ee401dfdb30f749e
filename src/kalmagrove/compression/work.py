"""The work folder beside the output: what is done already, so that a compression that was cut off goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.files import read_json_object, remove, sha256_of, whole_file, write_json_atomic
from kalmagrove.locks import LOCK_NAME, lock_folder, unlock
from kalmagrove.tensor_files import disk_errors

IDENTITY = "identity.json"


class WorkFolder:
    """Named tensors and documents, each of them whole or not there.

    Args:
        path: The folder; it is made where it is not there.
        identity: What the work depends on; a folder with another one is refused.

    Raises:
        UsageError: The folder is of another compression.
        KalmaGroveError: What it is of is damaged.
        FolderInUse: Another process compresses there.
        OSError: It cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        _require_work_folder_or_empty(path)
        path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(path, "Work folder")
        try:
            self._claim(identity)
        except BaseException:
            self.close()
            raise

    def _claim(self, identity: Mapping[str, Any]) -> None:
        document = self.path / IDENTITY
        if not document.is_file():
            write_json_atomic(document, dict(identity))
            return
        known = read_json_object(document, f"remove {self.path} to begin anew")
        if known != json.loads(json.dumps(identity)):
            differing = sorted(key for key in {*known, *identity} if known.get(key) != identity.get(key))
            raise UsageError(
                f"{self.path} holds an unfinished compression with other options ({', '.join(differing)}); give the "
                "same ones to go on, or remove the folder to begin anew"
            )

    def read_tensors(self, name: str) -> dict[str, Tensor] | None:
        """Tensors of a name, or None where they are not done.

        Raises:
            KalmaGroveError: The file is damaged.
        """
        path = self.path / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise KalmaGroveError(f"{path} is damaged ({error}); remove it to compute it again") from error

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors under a name, whole on the disk when this returns.

        Raises:
            OSError: They could not be written; nothing of that name is there.
        """
        path = self.path / f"{name}.safetensors"
        with disk_errors(path), whole_file(path) as temporary:
            save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary)

    def read_json(self, name: str) -> Any:
        """The document of a name, or None where it is not done.

        Raises:
            KalmaGroveError: The file is damaged.
        """
        path = self.path / f"{name}.json"
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise KalmaGroveError(f"{path} is damaged; remove it to compute it again") from error

    def write_json(self, name: str, value: Any) -> None:
        """Keeps a document under a name."""
        write_json_atomic(self.path / f"{name}.json", value)

    def remove(self) -> None:
        """Removes the folder and all that was done."""
        self.close()
        remove(self.path)

    def close(self) -> None:
        """Gives the folder free; doing so twice is harmless."""
        unlock(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _require_work_folder_or_empty(path: Path) -> None:
    """What is not ours is neither used nor, at the end, removed."""
    document = path / IDENTITY
    if document.is_file() or not path.exists():
        return
    # A crash before the identity was in place leaves only a lock or a temporary file.
    unfinished = (LOCK_NAME, f".{document.name}.tmp-")
    if not path.is_dir() or any(not entry.name.startswith(unfinished) for entry in path.iterdir()):
        raise UsageError(
            f"{path} is in the way: a compression keeps its work there, and it is not one's; choose another --out"
        )


def fingerprint_of(files: list[Path]) -> str:
    """SHA-256 over the content of files, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(path.name.encode() + bytes.fromhex(sha256_of(path)))
    return total.hexdigest()
