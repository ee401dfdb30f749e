"""Images: bits a pixel and labels by our models, which learn both, and by what classifies images alone.

    python benchmarks/images.py
    python benchmarks/images.py --sets digits --methods kalmagrove llama-adamw cnn
    python benchmarks/images.py --smoke --out runs/images
    python benchmarks/images.py --page docs/results/images.md

Needs the extras "benchmarks" and "vision"; MNIST and CIFAR-10 also the extra "data" and a network, and are skipped
without them. All models have about 200 k parameters and see the same images equally often. All methods are tuned alike:
with the first seed each tries three learning rates (logistic regression: three penalties) and keeps the one with the
best validation score, bits a pixel or nats a label, for the other seeds too; of each training the best of five looks at
the validation images is kept. A run leaves one JSON file under --out and is not repeated; with --page nothing is run:
the records are added to the .json file beside the page and its tables, between ``<!-- images SET -->`` and
``<!-- end -->``, are written again. Digits and photographs take about an hour on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from images_lab import ours, rivals
from images_lab.data import SETS, ImageSet, NoSuchSet
from images_lab.page import HEADING, TITLES, fill
from kalmagrove.files import write_json_atomic, write_text_atomic
from kalmagrove.training.environment import describe_environment
from parallel import stored

Record = dict[str, Any]


def run_once(images: ImageSet, path: Path, method: str, rate: float, seed: int) -> Record:
    """One training."""
    fit = rivals.fit if method in rivals.TITLES else ours.fit
    found = fit(images, path, method, rate=rate, seed=seed, epochs=images.epochs)
    terms = {"set": images.name, "origin": images.origin, "method": method, "rate": rate, "seed": seed}
    return terms | found | {"environment": describe_environment()}


def run_method(images: ImageSet, path: Path, method: str, seeds: Sequence[int], out: Path) -> list[Record]:
    """All seeds of a method with its best rate."""

    def record(rate: float, seed: int) -> Record:
        file = out / "runs" / images.name / f"{method}-rate{rate:g}-seed{seed}.json"
        return stored(file, partial(run_once, images, path, method, rate, seed))

    tried = [record(rate, seeds[0]) for rate in rivals.RATES.get(method, ours.RATES)]
    sound = [own for own in tried if "valid" in own]
    if not sound:
        return tried[:1]
    chief = ours.chief_of(sound[0]["valid"])
    best = min(sound, key=lambda own: own["valid"][chief])
    found = [record(best["rate"], seed) for seed in seeds]
    scores = [own["test"][chief] for own in found if "test" in own]
    mean = sum(scores) / len(scores)
    print(f"{images.name:<12} {TITLES[method]:<34} {chief} {mean:.4f}  rate {best['rate']:g}", flush=True)
    return found


def methods_for(images: ImageSet, path: Path, methods: Sequence[str]) -> list[str]:
    """Those that the set can be used with: without labels nothing is classified."""
    if ours.source_of(images, path, ours.VARIANTS["kalmagrove"]).form.classes:
        return list(methods)
    return [name for name in methods if name in ours.VARIANTS and ours.VARIANTS[name].learns == "all"]


def run_all(options: argparse.Namespace) -> None:
    """Runs what is missing, writes what a page needs, and prints the page's tables."""
    records: list[Record] = []
    for name in options.sets:
        images = replace(SETS[name], epochs=0.1) if options.smoke else SETS[name]
        try:
            path = images.write(options.out / "data")
        except NoSuchSet as reason:
            print(f"{name} is skipped: {reason}", flush=True)
            continue
        for method in methods_for(images, path, options.methods):
            records += run_method(images, path, method, options.seeds, options.out)
    write_json_atomic(options.out / "records.json", records)
    print(fill("", records))


def fill_page(page: Path, out: Path) -> None:
    """Adds the records of the runs to the file beside the page, and writes the page's tables."""
    kept_path, new_path = page.with_suffix(".json"), out / "records.json"
    files = [path for path in (kept_path, new_path) if path.exists()]
    if not files:
        raise SystemExit(f"there is no {new_path} and no {kept_path}; run the benchmark first")
    read = [record for path in files for record in json.loads(path.read_text("utf-8"))]
    records = {
        (own["set"], own["method"], own["seed"]): {name: own[name] for name in own if name != "environment"}
        for own in read
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(kept_path, list(records.values()))
    text = page.read_text("utf-8") if page.exists() else HEADING
    write_text_atomic(page, fill(text, list(records.values())))


def main() -> None:
    """Runs what is missing, or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="next to no training")
    parser.add_argument("--out", type=Path, default=Path("runs/images"))
    parser.add_argument("--page", type=Path, help="only write this page from the records")
    options = parser.parse_args()
    if options.smoke:
        options.out /= "smoke"
    if options.page is not None:
        fill_page(options.page, options.out)
        return
    run_all(options)


if __name__ == "__main__":
    main()
