"""A small text that every test of a whole command may train on."""

import os
import random
from pathlib import Path

# Tests run beside each other: two thread pools on the same cores would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from kalmagrove.data.packing import PackedText, prepare


def write_text(path: Path, documents: int = 60) -> Path:
    """Sentences of a small grammar, different in every document."""
    chance = random.Random(0)
    nouns, verbs = ["river", "engine", "garden", "teacher", "signal"], ["follows", "holds", "turns", "finds"]
    texts = []
    for number in range(documents):
        sentences = [
            f"The {chance.choice(nouns)} {chance.choice(verbs)} {chance.randrange(100)} {chance.choice(nouns)}s."
            for _ in range(20)
        ]
        texts.append(f"Story {number}. " + " ".join(sentences))
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "stories.txt")


@pytest.fixture(scope="session")
def packed(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedText:
    return prepare(str(text_file), tmp_path_factory.mktemp("packed") / "stories", vocab_size=300)


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
    counted = {"kills": "kills survived", "faults": "faults tried", "inputs": "hostile inputs tried"}
    totals = dict.fromkeys(counted, 0)
    for report in reports:
        for name, number in report.user_properties:
            if str(name).startswith("faults."):
                totals[name.removeprefix("faults.")] += number
    counts = ", ".join(f"{counted[name]}: {number:,}" for name, number in totals.items())
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{counts}, losses: {sum(report.failed for report in reports)}")
