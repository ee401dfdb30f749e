"""Nothing that could run code from a file is used anywhere in the package."""

import re
from pathlib import Path

import pytest

import kalmagrove

FORBIDDEN = {
    "pickle in any form": r"\b(?:c?[pP]ickle|joblib|dill|shelve|marshal)\b",
    "torch's own loading and saving": r"\btorch\.(?:load|save|jit\.load|package)\b",
    "torch's distributed checkpoints, whose .metadata is a pickle": r"\bdistributed\.checkpoint\b|\bload_object\b",
    "objects over the wire, which are pickled": r"\b(?:broadcast|all_gather|gather|scatter)_object(?:_list)?\b",
    "arrays of objects": r"allow_pickle",
    "code of a model's repository": r"trust_remote_code\s*=\s*True",
    "evaluated text": r"(?<![\w.])(?:eval|exec)\(",
    "unsafe YAML": r"\byaml\.(?:load|unsafe_load|full_load)\(",
    "extracted archives": r"\.extractall\(|\bunpack_archive\b",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_it_is_nowhere_in_the_package(what: str) -> None:
    files = list(Path(kalmagrove.__file__).parent.rglob("*.py"))
    assert len(files) > 80
    found = [path.name for path in files if re.search(FORBIDDEN[what], path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["import pickle", "torch.load(path)", "np.load(path, allow_pickle=True)", "yaml.load(text)", "x = eval(text)"],
)
def test_what_is_looked_for_would_be_found(line: str) -> None:
    assert any(re.search(pattern, line) for pattern in FORBIDDEN.values())
