"""How fast a long text is tokenised and packed, and in how much memory.

    python benchmarks/preparing.py                        10 GB
    python benchmarks/preparing.py --megabytes 500

Synthetic text is written to --scratch (left out: the system's folder of temporary files), prepared there by
kalmagrove.data.packing.prepare in a process of its own, and deleted. Its words are drawn with Zipf's frequencies, its
documents have 300 to 1,500 words, so that it is about as easily tokenised and as finely divided as English text.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kalmagrove.data.packing import prepare
from kalmagrove.data.sources import SEPARATOR
from kalmagrove.errors import UsageError
from kalmagrove.files import write_json_atomic
from kalmagrove.training.environment import describe_environment, peak_memory_bytes, reset_peak_memory

VOCABULARY = 100_000
SHORTEST_DOCUMENT, LONGEST_DOCUMENT = 300, 1500
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in ("a", "e", "i", "o", "u", "ea", "er")]
# The text, and its tokens in two bytes each, which are at least a third as many as the bytes.
DISK_FOR_A_BYTE = 1.7


@dataclass(frozen=True)
class Preparation:
    """What preparing a text took.

    Attributes:
        text_bytes: Of the text.
        tokens: Of all splits.
        documents: Of all splits.
        seconds: By the clock.
        core_seconds: Of processor time, all threads together.
        peak_memory_bytes: Of the process.
        memory_before_bytes: Peak of the process when nothing but the imports was done.
    """

    text_bytes: int
    tokens: int
    documents: int
    seconds: float
    core_seconds: float
    peak_memory_bytes: int
    memory_before_bytes: int


def synthetic_documents() -> Iterator[str]:
    """Different documents without end, of words with Zipf's frequencies in lines of about a dozen words."""
    chance = np.random.default_rng(0)
    lengths = chance.integers(1, 5, VOCABULARY)
    words = np.array(["".join(chance.choice(SYLLABLES, length)) for length in lengths])
    cumulated = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    while True:
        size = int(chance.integers(SHORTEST_DOCUMENT, LONGEST_DOCUMENT))
        drawn = words[np.searchsorted(cumulated, chance.random(size) * cumulated[-1])].tolist()
        yield "\n".join(" ".join(drawn[start : start + 12]) + "." for start in range(0, size, 12))


def write_text(path: Path, size: int) -> None:
    """Writes at least ``size`` bytes of documents to a file.

    Raises:
        UsageError: The disk has too little room for the text and its tokens.
    """
    needed, free = int(size * DISK_FOR_A_BYTE), shutil.disk_usage(path.parent).free
    if free < needed:
        raise UsageError(
            f"{path.parent} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; give fewer --megabytes "
            "or another --scratch"
        )
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for document in synthetic_documents():
            written += file.write(f"{document}\n{SEPARATOR}\n")
            if written >= size:
                return


def prepare_measured(source: Path, folder: Path, vocab_size: int) -> Preparation:
    """Prepares a text in this process and looks on."""
    reset_peak_memory("cpu")
    before = peak_memory_bytes("cpu")
    started, busy = time.perf_counter(), time.process_time()
    packed = prepare(str(source), folder, vocab_size=vocab_size)
    splits = packed.splits.values()
    return Preparation(
        text_bytes=sum(split.bytes for split in splits),
        tokens=sum(split.tokens for split in splits),
        documents=sum(split.documents for split in splits),
        seconds=time.perf_counter() - started,
        core_seconds=time.process_time() - busy,
        peak_memory_bytes=peak_memory_bytes("cpu"),
        memory_before_bytes=before,
    )


def _answer(answers: Any, source: Path, folder: Path, vocab_size: int) -> None:
    answers.put(prepare_measured(source, folder, vocab_size))


def prepare_in_a_process(source: Path, folder: Path, vocab_size: int) -> Preparation:
    """As `prepare_measured`, in a fresh process, whose memory is all for this.

    Raises:
        RuntimeError: The process failed; it said why.
    """
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=_answer, args=(answers, source, folder, vocab_size))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"preparing {source} failed with exit code {process.exitcode}")
    measured: Preparation = answers.get()
    return measured


def show(measured: Preparation) -> None:
    """Prints what was measured."""
    size, peak, before = measured.text_bytes / 1e6, measured.peak_memory_bytes / 1e6, measured.memory_before_bytes / 1e6
    print(f"text            {size:>10,.1f} MB in {measured.documents:,} documents, {measured.tokens:,} tokens")
    print(f"speed           {size / measured.seconds:>10,.1f} MB/s, {measured.seconds:,.1f} s")
    print(f"speed a core    {size / measured.core_seconds:>10,.1f} MB/s, {measured.core_seconds:,.1f} core seconds")
    print(f"peak memory     {peak:>10,.1f} MB, {before:,.1f} MB before the text")


def main() -> None:
    """Writes a text, prepares it, prints, deletes both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=10_000)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        source = Path(scratch) / "text.txt"
        write_text(source, options.megabytes * 10**6)
        measured = prepare_in_a_process(source, Path(scratch) / "packed", options.vocab_size)
    show(measured)
    if options.out is not None:
        record = {"megabytes": options.megabytes, "vocab_size": options.vocab_size, "measured": asdict(measured)}
        write_json_atomic(options.out, record | {"environment": describe_environment()})


if __name__ == "__main__":
    main()
