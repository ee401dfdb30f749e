"""docs/architecture.md names every module of the package, and none that is gone."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOUSE = (ROOT / "docs/architecture.md").read_text()
PACKAGE = ROOT / "src/kalmagrove"


def test_every_module_is_named() -> None:
    unnamed = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if not path.name.startswith("__") and path.parent.name != "commands" and path.name not in HOUSE
    ]
    assert not unnamed, f"docs/architecture.md says nothing of {', '.join(sorted(unnamed))}"


def test_no_module_is_named_that_is_gone() -> None:
    there = {path.name for path in PACKAGE.rglob("*.py")}
    assert set(re.findall(r"\b[a-z_]+\.py\b", HOUSE)) <= there
