"""Writes a JSONL that mixes texts, images and rows of a table: digits to be read, wines to be told apart.

    python docs/examples/digits_and_wines.py runs/mixed-data

Needs scikit-learn, whose digits (1,797 images of 8 x 8 pixels) and wines (178 rows of 13 numbers) are bundled with it,
and Pillow. A tenth of each is for validation, a fifth for the test.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_wine

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = (("test", 0.2), ("valid", 0.1))
WINES_AGAIN = 4
"""Times that each wine is asked about in training, so that there are about half as many questions of them."""


def digit_lines(folder: Path, most: int | None) -> list[dict[str, Any]]:
    """A question about each image, with its answer in words."""
    digits = load_digits()
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (pixels, label) in enumerate(zip(digits.images[:most], digits.target[:most], strict=True)):
        name = f"digits/{number}.png"
        Image.fromarray((pixels * 15).astype(np.uint8)).save(folder / name)
        answer = f" It is a {NAMES[label]}."
        lines.append({"parts": [{"image": name}, {"text": "What is drawn here?"}, {"text": answer, "learn": True}]})
    return lines


def wine_lines(most: int | None) -> list[dict[str, Any]]:
    """A question about each row of the table."""
    wines = load_wine()
    lines = []
    for cells, label in zip(wines.data[:most], wines.target[:most], strict=True):
        row = dict(zip(wines.feature_names, map(float, cells), strict=True))
        answer = f" The {('first', 'second', 'third')[label]} cultivar."
        lines.append({"parts": [{"row": row}, {"text": "Which wine is it?"}, {"text": answer, "learn": True}]})
    return lines


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--most", type=int, default=None, help="only so many digits and wines")
    options = parser.parse_args()
    generator = np.random.Generator(np.random.PCG64(0))
    found: dict[str, list[dict[str, Any]]] = {"train": [], "valid": [], "test": []}
    for lines, again in ((digit_lines(options.folder, options.most), 1), (wine_lines(options.most), WINES_AGAIN)):
        order = generator.permutation(len(lines))
        begin = 0
        for split, share in SPLITS:
            end = begin + round(share * len(lines))
            found[split] += [lines[place] for place in order[begin:end]]
            begin = end
        found["train"] += [lines[place] for place in order[begin:]] * again
    for split, lines in found.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (options.folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
