"""Examples are packed once, found again, checked, and batched as a pure function of seed and step."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from example_data import TinySource

from kalmagrove.data.example_store import SCHEMA, open_examples, prepare_examples
from kalmagrove.errors import KalmaGroveError, UsageError


def test_a_row_holds_its_parts_in_a_drawn_order(tmp_path: Path) -> None:
    source = TinySource()
    data = prepare_examples(source, tmp_path / "packed")
    assert data.longest == 8 and data.splits["train"].documents == 60 and data.splits["valid"].words == 15 * 18
    rows = data.rows("train", range(60))
    patch, number = source.id_of("<patch>"), source.id_of("<number>")
    assert (rows.tokens[:, 0] == data.end_of_text_id).all() and (rows.tokens[:, -1] == data.end_of_text_id).all()
    assert rows.weights.sum(dim=1).tolist() == [6.0] * 60
    assert ((rows.tokens == patch).sum(dim=1) == 4).all() and ((rows.tokens == number).sum(dim=1) == 1).all()
    # Each of the six orders of the three parts comes, and features go with their placeholders.
    assert len({tuple(row.tolist()) for row in rows.tokens == patch}) > 2
    assert (rows.features["patch"][rows.tokens != patch] == 0).all()
    brightness = rows.features["patch"][..., :4].sum(dim=(1, 2)) / 16
    scaled = rows.features["number"][..., 2].sum(dim=1)
    assert torch.corrcoef(torch.stack((brightness, scaled)))[0, 1] > 0.95


def test_axes_give_patches_rows_and_columns_and_words_twice_the_same(tmp_path: Path) -> None:
    data = prepare_examples(replace(TinySource(), shuffles=False), tmp_path / "packed")
    axes = data.rows("test", range(1)).axes
    assert axes is not None
    assert axes[0].tolist() == [[0, 0], [1, 1], [1, 2], [2, 1], [2, 2], [3, 3], [4, 4], [5, 5]]


def test_batches_are_a_pure_function_and_epochs_differ(tmp_path: Path) -> None:
    data = prepare_examples(TinySource(), tmp_path / "packed")
    terms = {"context_length": 9, "batch_size": 20, "seed": 3}
    first, again = (data.batch("train", step=1, **terms) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.features["patch"], again.features["patch"])
    # No longer than the longest example.
    assert first.tokens.shape == (20, 8)
    part = data.batch("train", step=1, rows=range(5, 9), **terms)
    assert torch.equal(part.tokens, first.tokens[5:9])
    epoch = torch.cat([data.batch("train", step=step, **terms).features["patch"] for step in range(3)])
    following = torch.cat([data.batch("train", step=step, **terms).features["patch"] for step in range(3, 6)])
    assert not torch.equal(epoch, following)
    images = [sorted(map(tuple, e.flatten(1).sort(dim=1).values.tolist())) for e in (epoch, following)]
    assert images[0] == images[1]


def test_the_same_source_is_found_again_and_another_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    first = prepare_examples(TinySource(), folder)
    assert prepare_examples(TinySource(), folder) == first == open_examples(folder)
    with pytest.raises(KalmaGroveError, match="something else"):
        prepare_examples(replace(TinySource(), inputs={"seed": 1}), folder)


@pytest.mark.parametrize("name", ["train.tokens.bin", "valid.patch.bin", "test.places.bin", SCHEMA, "tokenizer.json"])
def test_a_changed_file_is_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "packed"
    prepare_examples(TinySource(), folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-2] + b"  ")
    with pytest.raises(KalmaGroveError, match=r"delete the folder and prepare it again|not a sound tokenizer"):
        open_examples(folder)


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    prepare_examples(TinySource(), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shuffles": False}))
    with pytest.raises(KalmaGroveError, match="fingerprint"):
        open_examples(folder)


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KalmaGroveError, match="holds no example"):
        prepare_examples(replace(TinySource(), count=0), tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_too_short_a_context_names_the_one_that_is_needed(tmp_path: Path) -> None:
    data = prepare_examples(TinySource(), tmp_path / "packed")
    data.check_context(7)
    with pytest.raises(UsageError, match=r"needs --loop\.context_length 7, got 6"):
        data.check_context(6)
