"""A small text that every test of a whole command may train on, and invented results of a comparison."""

import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Tests run beside each other: two thread pools on the same cores would wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from kalmagrove.data.packing import PackedText, prepare

# The same examples on every machine, however slow it is; `make soak` draws new ones.
settings.register_profile("tests", deadline=None, derandomize=os.environ.get("KALMAGROVE_FAULT_FRESH") != "1")
settings.load_profile("tests")


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


Record = dict[str, Any]


def make_scores(perplexity: float) -> Record:
    loss = math.log(perplexity)
    return {
        "loss": loss,
        "perplexity": perplexity,
        "word_perplexity": perplexity**2,
        "bits_per_byte": loss / math.log(2) / 4,
        "tokens": 999,
        "optimum": None,
    }


def make_run(seed: int, perplexity: float | None, *, diverged: bool = False, points: int = 20) -> Record:
    end = math.log(perplexity or 50.0)
    tokens = [500 * (index + 1) for index in range(points)]
    return {
        "seed": seed,
        "folder": f"some/seed-{seed}",
        "diverged": diverged,
        "seconds": None if perplexity is None else 12.5,
        "valid": None if perplexity is None else make_scores(perplexity * 0.9),
        "test": None if perplexity is None else make_scores(perplexity),
        "curve": {
            "tokens": tokens,
            "seconds": [token / 1000 for token in tokens],
            "loss": [end + 4.0 / (index + 1) for index in range(points)],
        },
        "valid_curve": {"tokens": tokens[9::10], "loss": [end + 0.5 for _ in tokens[9::10]]},
        "spikes": None,
        "source": None,
    }


def make_model(name: str, parameters: int, runs: list[Record], *, optim: str = "adamw") -> Record:
    return {
        "name": name,
        "preset": name,
        "optim": optim,
        "precision": "fp32",
        "model_config": {"hidden_size": 128, "norm": "rmsnorm"},
        "optim_config": {"name": optim, "lr": 0.003},
        "lr_trials": [],
        "lr_scale": 1.0,
        "auxiliary_scale": 1.0,
        "parameters": {"total": parameters, "embedding": 300, "non_embedding": parameters - 300},
        "flops_per_token": parameters * 6,
        "decode_state_bytes": None,
        "step_seconds": 0.08,
        "peak_memory_bytes": 200_000_000,
        "runs": runs,
    }


@pytest.fixture
def make_results() -> Callable[..., Record]:
    """Results of ``ours`` against ``llama`` from the test perplexities of each seed; None is an unfinished run."""

    def make(
        ours: tuple[float | None, ...] = (27.0,),
        llama: tuple[float | None, ...] = (30.0,),
        *,
        time_ratios: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7),
        others: dict[str, tuple[float, ...]] | None = None,
    ) -> Record:
        def model(name: str, parameters: int, perplexities: tuple[float | None, ...]) -> Record:
            return make_model(name, parameters, [make_run(seed, value) for seed, value in enumerate(perplexities)])

        rivals = [model(name, 1500, perplexities) for name, perplexities in (others or {}).items()]
        return {
            "format": 1,
            "title": "ours against llama",
            "command": "kalmagrove compare --out runs/demo",
            "created": "2025-06-01T12:00:00+0000",
            "data": {
                "source": "book.txt",
                "fingerprint": "1234abcd",
                "vocab_size": 300,
                "tokenizer_fingerprint": "5678abcd",
                "modality": "text",
                "splits": {"train": {"tokens": 8000, "bytes": 24000, "words": 4000, "documents": 12}},
            },
            "budget": {"tokens": 10000, "steps": 20, "tokens_per_step": 500, "context_length": 64, "epochs": 1.25},
            "seeds": list(range(len(llama))),
            "trials": 1,
            "trial_tokens": None,
            "environment": {"python": "3.12.1", "usable_cores": 4, "packages": {"torch": "2.11.0", "numpy": None}},
            "baseline": "llama",
            "candidate": "ours",
            "models": [model("llama", 2000, llama), *rivals, model("ours", 1000, ours)],
            "paired_time": [{"model": "ours", "baseline": "llama", "ratios": list(time_ratios)}],
            "rechecks": [],
            "auxiliary_trials": [],
            "side_by_side": False,
            "timing_environment": None,
        }

    return make
