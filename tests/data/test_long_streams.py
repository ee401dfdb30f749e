"""A text far longer than what may be held of it is prepared in bounded memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kalmagrove.data.sources import SEPARATOR
from kalmagrove.data.tokenizer import save_tokenizer, train_tokenizer

MEGABYTE = 10**6
TEXT_BYTES = 200 * MEGABYTE
MOST_MEMORY_BYTES = 150 * MEGABYTE
"""Beside what the imports take. A text that is held as a whole takes more than its own size."""

PREPARE = """
import sys
from pathlib import Path
from tokenizers import Tokenizer
from kalmagrove.data.packing import prepare
from kalmagrove.training.environment import peak_memory_bytes, reset_peak_memory

source, tokenizer, folder = sys.argv[1:]
reset_peak_memory("cpu")
before = peak_memory_bytes("cpu")
packed = prepare(source, Path(folder), tokenizer=tokenizer)
print(peak_memory_bytes("cpu") - before, sum(split.bytes for split in packed.splits.values()))
"""


def long_documents() -> list[str]:
    """Sixty texts of words with Zipf's frequencies, 35,000 characters each or so."""
    ranks = np.minimum(np.random.default_rng(0).zipf(1.2, 480_000), 100_000).astype(str)
    return [" ".join("w" + rank for rank in ranks[start : start + 8000]) for start in range(0, len(ranks), 8000)]


def write_text(path: Path, texts: list[str]) -> None:
    """The texts again and again, each time under a new heading, so that no document is another's duplicate."""
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < TEXT_BYTES:
            number += 1
            written += file.write(f"Text {number}\n{texts[number % len(texts)]}\n{SEPARATOR}\n")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a peak from a moment on")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    texts = long_documents()
    save_tokenizer(train_tokenizer(texts, 1024), tmp_path, context_length=None)
    source = tmp_path / "text.txt"
    write_text(source, texts)
    words = [str(source), str(tmp_path / "tokenizer.json"), str(tmp_path / "packed")]
    result = subprocess.run(
        [sys.executable, "-c", PREPARE, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"RAYON_NUM_THREADS": "2"},
    )
    assert result.returncode == 0, result.stderr
    used, text_bytes = map(int, result.stdout.split())
    assert text_bytes > 0.98 * TEXT_BYTES
    assert used < MOST_MEMORY_BYTES, f"{used / MEGABYTE:.0f} MB"
