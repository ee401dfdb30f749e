"""Packages depend on one another in one direction."""

import ast
from graphlib import TopologicalSorter
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


def test_no_package_needs_one_that_needs_it() -> None:
    needs: dict[str, set[str]] = {}
    for file in SOURCE.glob("*/**/*.py"):
        package = file.relative_to(SOURCE).parts[0]
        needs.setdefault(package, set()).update(imported_packages(file) - {package})
    assert len(needs) > 10 and "models" in needs["training"]
    # Raises CycleError, which names the cycle.
    order = list(TopologicalSorter(needs).static_order())
    assert order.index("nn") < order.index("models") < order.index("training") < order.index("commands")
