"""The documentation builds as a site without a warning, and its reference has every public name."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PACKAGES = ("kalmagrove", "kalmagrove.nn", "kalmagrove.optim", "kalmagrove.adaptors")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = "\n".join(path.read_text("utf-8") for path in (tmp_path / "reference").glob("*.html"))
    for package in PACKAGES:
        names = [name for name in importlib.import_module(package).__all__ if not name.startswith("__")]
        lacking = [name for name in names if f'.{name}"' not in pages]
        assert not lacking, f"docs/reference lacks {', '.join(lacking)} of {package}"
