"""A folder of examples whose digests are right and whose content is not, as one from elsewhere may be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_data import TinySource

from kalmagrove.data.example_store import open_examples, prepare_examples
from kalmagrove.errors import KalmaGroveError

KINDS = ("tokens", "weights", "slots", "places", "parts", "examples", "number", "patch")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare_examples(TinySource(), tmp_path / "packed")
    return tmp_path / "packed"


def sealed(folder: Path, changed: dict[str, Any]) -> None:
    """Writes a manifest whose digests and fingerprint fit what lies there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    splits = manifest["splits"]
    for split, info in splits.items():
        digests = [hashlib.sha256((folder / f"{split}.{kind}.bin").read_bytes()).hexdigest() for kind in KINDS]
        info["sha256"] = hashlib.sha256("".join(digests).encode()).hexdigest()
    manifest |= changed
    learnt = {name: value for name, value in manifest.items() if name not in ("source", "inputs", "fingerprint")}
    manifest["fingerprint"] = hashlib.sha256(json.dumps(learnt, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_is_sealed_and_not_changed_opens(folder: Path) -> None:
    sealed(folder, {})
    assert open_examples(folder).longest == 8


WRONG_FIELDS: dict[str, dict[str, Any]] = {
    "a length without end": {"longest": 1 << 50},
    "too short a length": {"longest": 7},
    "a length in words": {"longest": "8"},
    "a vocabulary without end": {"vocab_size": 1 << 40},
    "an end that is none": {"end_of_text_id": 1 << 40},
    "an end before the first": {"end_of_text_id": -1},
    "a flag in words": {"shuffles": "yes"},
    "a source that is none": {"source": None},
    "no modalities": {"modalities": None},
    "a list of modalities": {"modalities": ["number"]},
    "a modality elsewhere": {"modalities": {"../../secret": {"placeholder": 1}}},
    "an option that is none": {"modalities": {"number": {"placeholder": 1, "bins": "many"}}},
    "a placeholder that is none": {"modalities": {"number": {"placeholder": "x", "bins": [4]}}},
    "patches without end": {
        "modalities": {
            "patch": {
                "placeholder": 1, "patch_size": 1 << 40, "channels": 1 << 40, "levels": 8, "rows": 2, "columns": 2,
            }
        }
    },
    "no splits": {"splits": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_a_manifest_that_lies_is_one_clear_error(name: str, folder: Path) -> None:
    sealed(folder, WRONG_FIELDS[name])
    with pytest.raises(KalmaGroveError, match="delete the folder and prepare it again"):
        open_examples(folder)


Change = Callable[[np.ndarray], np.ndarray]
WRONG_FILES: dict[str, tuple[str, str, Change]] = {
    "a token that is none": ("tokens", "<u4", lambda values: values + 100_000),
    "fewer tokens": ("tokens", "<u4", lambda values: values[:-1]),
    "no tokens": ("tokens", "<u4", lambda values: values[:0]),
    "half a token": ("tokens", "u1", lambda values: values[:-1]),
    "fewer weights": ("weights", "u1", lambda values: values[:-1]),
    "a heavy weight": ("weights", "u1", lambda values: values * 9),
    "half a place": ("places", "<u2", lambda values: values[:-1]),
    "slots of others": ("slots", "<u4", lambda values: values + 1_000),
    "a part behind the last token": ("parts", "<u8", lambda values: values + 1),
    "parts that go back": ("parts", "<u8", lambda values: np.concatenate([values[1:2], values[:1], values[2:]])),
    "a part before the first": ("parts", "<u8", lambda values: np.concatenate([[np.uint64(2**63 + 5)], values[1:]])),
    "an example behind the last part": ("examples", "<u8", lambda values: values + 1),
    "fewer examples": ("examples", "<u8", lambda values: values[:-1]),
    "no examples": ("examples", "<u8", lambda values: values[:0]),
    "fewer features": ("patch", "<f4", lambda values: values[:-6]),
    "half a feature": ("patch", "<f4", lambda values: values[:-1]),
    "no features": ("number", "<f4", lambda values: values[:0]),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_files_that_do_not_fit_each_other_are_one_clear_error(name: str, folder: Path) -> None:
    kind, dtype, change = WRONG_FILES[name]
    path = folder / f"valid.{kind}.bin"
    path.write_bytes(change(np.fromfile(path, dtype=dtype)).astype(dtype).tobytes())
    sealed(folder, {})
    with pytest.raises(KalmaGroveError, match="delete the folder and prepare it again"):
        open_examples(folder)
