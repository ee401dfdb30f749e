"""Packages depend on one another in one direction, that of docs/architecture.md."""

import ast
from pathlib import Path

import kalmagrove

SOURCE = Path(kalmagrove.__file__).parent


def imported_packages(file: Path) -> set[str]:
    """The packages of this house that a module imports, wherever in it."""
    names = [
        node.module.split(".")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kalmagrove.")
    ]
    return {name[1] for name in names if (SOURCE / name[1]).is_dir()}


def test_packages_import_from_the_lines_above_their_own() -> None:
    page = (SOURCE.parents[1] / "docs/architecture.md").read_text()
    section = page.split("## Which way dependencies run")[1].split("```")[1]
    line = {name: n for n, names in enumerate(section.split("\n")) for name in names.split(", ") if name}
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert set(line) == packages
    for file in SOURCE.glob("*/**/*.py"):
        package = file.relative_to(SOURCE).parts[0]
        for other in imported_packages(file) - {package}:
            assert line[other] < line[package], f"{file.relative_to(SOURCE)} imports {other}"
