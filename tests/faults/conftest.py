"""What the fault tests share: how much they try, a place for counts, and the summary that prints them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Test folders are not on the path of imports, and these tests share a few helpers.
sys.path.insert(0, str(Path(__file__).parent))

from fault_server import FaultServer

COUNTED = {"kills": "kills survived", "faults": "faults tried", "inputs": "hostile inputs tried"}


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Adds to a number of the terminal summary; it travels with the test's report, from workers too."""
    totals = dict.fromkeys(COUNTED, 0)

    def add(name: str, number: int) -> None:
        key, earlier = f"faults.{COUNTED[name]}", totals[name]
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how much was tried, and in how many tests something was lost."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" and "tests/faults/" in report.nodeid
    ]
    if not reports:
        return
    totals = dict.fromkeys(COUNTED.values(), 0)
    for report in reports:
        for name, number in report.user_properties:
            if str(name).startswith("faults."):
                totals[name.removeprefix("faults.")] += number
    counts = ", ".join(f"{name}: {number:,}" for name, number in totals.items())
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{counts}, losses: {sum(report.failed for report in reports)}")
