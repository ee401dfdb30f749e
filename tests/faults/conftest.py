"""What the fault tests share: how much they try, and a place for counts; the summary is in tests/conftest.py."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Test folders are not on the path of imports, and these tests share a few helpers.
sys.path.insert(0, str(Path(__file__).parent))

from fault_server import FaultServer


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Adds to a number of the terminal summary; it travels with the test's report, from workers too."""
    totals = dict.fromkeys(("kills", "faults", "inputs"), 0)

    def add(name: str, number: int) -> None:
        key, earlier = f"faults.{name}", totals[name]
        totals[name] += number
        if earlier:
            request.node.user_properties.remove((key, earlier))
        request.node.user_properties.append((key, totals[name]))

    return add


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultServer]:
    """Runs commands of the package in children that may be killed."""
    with FaultServer(tmp_path_factory.mktemp("server") / "output.txt") as running:
        yield running
