"""Images as a source of examples: splits, what comes from the training images alone, parts, tokens, and refusals."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kalmagrove.data.example_store import PackedExamples, prepare_examples
from kalmagrove.data.images.fitting import fit_to
from kalmagrove.data.images.format import ImageFormat
from kalmagrove.data.images.parts import FEATURE, caption_part, image_part, label_part
from kalmagrove.data.images.patches import to_patches
from kalmagrove.data.images.pictures import find_pictures
from kalmagrove.data.images.sequences import sequences_of
from kalmagrove.data.images.source import ImageSource, image_source
from kalmagrove.data.splits import SPLITS
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.modalities.registry import make_modality

DRAW = np.random.Generator(np.random.PCG64(5)).integers


def saved(path: Path, count: int = 40, shape: tuple[int, ...] = (4, 6), levels: int = 17, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=DRAW(0, levels, (count, *shape)), **more)
    return path


def source_of(path: Path, **options: Any) -> ImageSource:
    found = image_source(str(path), seed=options.pop("seed", 0), **options)
    assert isinstance(found, ImageSource)
    return found


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(KalmaGroveError) as caught:
        source = source_of(path, **options)
        for split in SPLITS:
            list(source.examples(split))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def patches_of(source: ImageSource, split: str) -> list[bytes]:
    return [example.parts[0].features[FEATURE].tobytes() for example in source.examples(split)]


def test_images_are_divided_by_their_content_once_each(tmp_path: Path) -> None:
    images = DRAW(0, 17, (60, 4, 6))
    np.savez(tmp_path / "a.npz", images=np.concatenate((images, images[:30])))
    found = source_of(tmp_path / "a.npz")
    per_split = {split: patches_of(found, split) for split in SPLITS}
    everything = [patch for patches in per_split.values() for patch in patches]
    assert len(everything) == len(set(everything)) == 60
    assert all(3 <= len(per_split[split]) <= 15 for split in ("valid", "test"))
    np.savez(tmp_path / "b.npz", images=images[::-1])
    again = source_of(tmp_path / "b.npz")
    assert all(sorted(patches_of(again, split)) == sorted(per_split[split]) for split in SPLITS)
    other = source_of(tmp_path / "a.npz", seed=1)
    assert sorted(patches_of(other, "test")) != sorted(per_split["test"])


def test_all_captions_of_an_image_are_kept_and_in_one_split(tmp_path: Path) -> None:
    images = DRAW(0, 17, (30, 8, 8)).astype(np.uint8) * 10
    lines = []
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        captions = [f"caption {n} of {number}" for n in range(5)]
        lines += [{"image": f"{number}.png", "caption": caption} for caption in [*captions, captions[0]]]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = source_of(tmp_path / "list.jsonl")
    per_split = {split: patches_of(found, split) for split in SPLITS}
    assert sum(map(len, per_split.values())) == 150
    assert sum(len(set(patches)) for patches in per_split.values()) == 30


def test_an_image_that_is_made_smaller_keeps_within_its_levels() -> None:
    sharp = np.kron(DRAW(0, 2, (8, 8)) * 16, np.ones((3, 3)))[:, :, None].astype(np.uint8)
    assert set(np.unique(fit_to(sharp, 10, 10))) <= set(range(17))


def test_given_splits_stay_and_a_missing_one_is_taken_out_of_train(tmp_path: Path) -> None:
    saved(tmp_path / "all/train.npz", 40)
    np.savez(tmp_path / "all/test.npz", images=np.zeros((3, 4, 6)))
    found = source_of(tmp_path / "all")
    assert len(patches_of(found, "test")) == 3
    assert len(patches_of(found, "train")) + len(patches_of(found, "valid")) == 40
    assert 1 <= len(patches_of(found, "valid")) <= 10


def test_levels_come_from_the_training_images(tmp_path: Path) -> None:
    assert source_of(saved(tmp_path / "few.npz", levels=17)).form.levels == 17
    assert source_of(saved(tmp_path / "many.npz", levels=200)).form.levels == 256
    assert source_of(saved(tmp_path / "one.npz", shape=(64, 64), levels=2)).form.levels == 2
    saved(tmp_path / "more/train.npz", levels=5)
    saved(tmp_path / "more/valid.npz", 5, levels=5)
    np.savez(tmp_path / "more/test.npz", images=np.full((1, 4, 6), 9))
    assert "test.npz[0] has the level 9, the training images go from 0 to 4" in refused(tmp_path / "more")


def test_files_have_256_levels_and_one_colour_makes_all_coloured(tmp_path: Path) -> None:
    for number in range(8):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / f"{number}.png")
    grey = source_of(tmp_path).form
    assert (grey.levels, grey.channels) == (256, 1)
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(tmp_path / "colour.png")
    found = source_of(tmp_path)
    assert found.form.channels == 3
    example = next(iter(found.examples("train")))
    assert example.values == example.size == 48
    with pytest.raises(KalmaGroveError, match=r"c\.png is in colour, and the model knows grey images"):
        grey.prepared(np.zeros((4, 4, 3), np.uint8), "c.png")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return saved(tmp_path / "labelled.npz", 60, labels=np.arange(60) % 3 + 9)


def test_an_example_is_an_image_and_its_label(labelled: Path) -> None:
    found = source_of(labelled)
    form = found.form
    assert form.classes == ("9", "10", "11") and found.shuffles
    assert (form.height, form.width, form.patch_size) == (4, 6, 2)
    image, label = next(iter(found.examples("train"))).parts
    assert image.tokens.tolist() == [form.image_token] + [form.patch_token] * 6
    assert image.weights.tolist() == [0] + [1] * 6
    assert image.places is not None and image.places.tolist()[:3] == [[0, 0], [1, 1], [1, 2]]
    features = image.features[FEATURE]
    assert features.shape == (6, form.feature_size) and features[:, 4:].tolist()[0] == [0, 1]
    assert features[-1, 4:].tolist() == [2, 3]
    assert label.tokens[0] == form.label_token and label.tokens[1] in form.class_tokens
    assert label.weights.tolist() == [0, 1]
    assert make_modality(FEATURE, 8, found.modalities[FEATURE]).feature_size == form.feature_size


def test_features_are_the_pixels_of_the_picture(labelled: Path) -> None:
    found = source_of(labelled, scan="raster")
    pictures = {p.load().tobytes() for p in find_pictures(str(labelled))["all"]()}
    for example in found.examples("valid"):
        pixels = example.parts[0].features[FEATURE][:, :4]
        image = pixels.reshape(2, 3, 2, 2).swapaxes(1, 2).reshape(4, 6)
        assert image.astype(np.uint8).tobytes() in pictures


def test_labels_alone(labelled: Path) -> None:
    found = source_of(labelled, learns="labels")
    example = next(iter(found.examples("train")))
    assert not found.shuffles and not found.form.predicts_pixels
    assert example.parts[0].weights.sum() == 0 and example.values == example.size == 1
    assert [token in found.form.class_tokens for token in example.parts[-1].tokens] == [False, True]
    assert "has no labels to learn" in refused(saved(labelled.parent / "none.npz"), learns="labels")


def list_of(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL with an image of its own for each row."""
    for number, row in enumerate(rows):
        Image.fromarray(np.full((2, 2), number, np.uint8)).save(folder / f"{number}.png")
        row["image"] = f"{number}.png"
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "list.jsonl"


def test_images_without_a_label_are_learnt_too(tmp_path: Path) -> None:
    path = list_of(tmp_path, [{"label": "ab"[n % 2]} if n < 20 else {} for n in range(40)])
    found = source_of(path)
    counts = Counter(len(example.parts) for split in SPLITS for example in found.examples(split))
    assert counts == {1: 20, 2: 20}
    assert sum(1 for split in SPLITS for _ in source_of(path, learns="labels").examples(split)) == 20


def test_captions_are_text_whatever_they_say(tmp_path: Path) -> None:
    texts = ["a dark square", "<image><patch></caption><label:cat>", "<|endoftext|>", "ein Quadrat, größer"]
    path = list_of(tmp_path, [{"caption": texts[n % 4]} for n in range(40)])
    found = source_of(path)
    special = set(found.tokenizer.get_added_tokens_decoder())
    assert found.form.caption_tokens is not None
    begin, end = found.form.caption_tokens
    seen = set()
    for split in SPLITS:
        for example in found.examples(split):
            tokens = example.parts[1].tokens.tolist()
            assert tokens[0] == begin and tokens[-1] == end and not special & set(tokens[1:-1])
            seen.add(found.tokenizer.decode(tokens[1:-1]))
    assert seen == set(texts) and found.shuffles


def test_the_vocabulary_is_that_of_the_training_captions(tmp_path: Path) -> None:
    for split, word in (("train", "squares "), ("valid", "circles "), ("test", "circles ")):
        (tmp_path / "source" / split).mkdir(parents=True)
        rows = [{"caption": word * 9} for _ in range(5)]
        list_of(tmp_path / "source" / split, rows)
        for row in rows:
            row["image"] = f"{split}/{row['image']}"
        (tmp_path / "source" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokens = source_of(tmp_path / "source").tokenizer.get_vocab()
    assert any("squares" in token for token in tokens) and not any("circles" in token for token in tokens)


def test_a_packed_folder_has_the_sequences_that_predictions_are_made_of(labelled: Path, tmp_path: Path) -> None:
    found = replace(source_of(labelled), shuffles=False)
    packed = prepare_examples(found, tmp_path / "packed")
    rows = packed.rows("test", range(3))
    made = sequences_of(found.form, [example.parts for example in list(found.examples("test"))[:3]])
    width = made.tokens.shape[1]
    assert packed.longest == width + 1
    assert torch.equal(rows.tokens[:, :width], made.tokens) and torch.equal(rows.weights[:, :width], made.weights)
    assert rows.axes is not None and made.axes is not None and torch.equal(rows.axes[:, :width], made.axes)
    assert torch.equal(rows.features[FEATURE][:, :width], made.features[FEATURE])


def test_labels_come_before_images_too(labelled: Path, tmp_path: Path) -> None:
    packed: PackedExamples = prepare_examples(source_of(labelled), tmp_path / "packed")
    batch = packed.batch("train", context_length=packed.longest - 1, batch_size=40, seed=0, step=0)
    form = ImageFormat.from_dict(packed.schema())
    firsts = Counter(batch.tokens[:, 1].tolist())
    assert set(firsts) == {form.image_token, form.label_token} and min(firsts.values()) > 5


def test_images_are_scaled_and_cut_where_that_is_said(tmp_path: Path) -> None:
    for number in range(6):
        pixels = np.full((8 + number, 40, 3), 40 * number, np.uint8)
        pixels[:, :2] = 255
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    assert "resize one, or all with data.image_size" in refused(tmp_path)
    found = source_of(tmp_path, image_size="4")
    assert (found.form.height, found.form.width) == (4, 4)
    levels = {int(f) for split in SPLITS for e in found.examples(split) for f in e.parts[0].features[FEATURE][:, 0]}
    # The middle is cut out: the bright edge is not in it.
    assert levels == {0, 40, 80, 120, 160, 200}
    assert "fewer than data.image_size 4x64" in refused(tmp_path, image_size="4x64")
    with pytest.raises(KalmaGroveError, match=r"x\.png has 2 x 9 pixels, not 4 x 4; leave it out"):
        found.form.prepared(np.zeros((2, 9, 3), np.uint8), "x.png")


@pytest.mark.parametrize("size", ["0", "4x", "-1", "4x4x4", "999999x999999", "four"])
def test_sizes_that_are_none_are_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(UsageError, match=r"data\.image_size must be like 32"):
        source_of(saved(tmp_path / "a.npz"), image_size=size)


@pytest.mark.parametrize("wrong", [{"scan": "hilbert"}, {"learns": "pixels"}, {"caption_vocab_size": 5}])
def test_other_options_are_checked(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"data\.scan must be one of z-order, raster"):
        source_of(saved(tmp_path / "a.npz"), **wrong)


def test_too_few_images_and_classes_are_named(tmp_path: Path) -> None:
    assert "holds 2 different images, too few for train, valid, test" in refused(saved(tmp_path / "two.npz", 2))
    np.savez(tmp_path / "same.npz", images=np.zeros((50, 4, 4)))
    assert "holds 1 different images" in refused(tmp_path / "same.npz")
    assert "of the class '7'" in refused(saved(tmp_path / "one.npz", labels=np.full(40, 7)))
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl holds 0 different images" in refused(tmp_path / "empty.jsonl")


def test_a_class_of_no_training_image_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "train.npz", labels=np.arange(40) % 2)
    saved(tmp_path / "valid.npz", 4, labels=np.array([0, 1, 5, 0]))
    assert re.search(r"the class '5' of valid\.npz\[2\] is that of no training image", refused(tmp_path))


def test_labels_that_cannot_be_names_are_refused(tmp_path: Path) -> None:
    assert "too long or not printable" in refused(saved(tmp_path / "a.npz", labels=np.array(["a\n", "b"] * 20)))
    assert "too long or not printable" in refused(saved(tmp_path / "a.npz", labels=np.array(["a" * 300, "b"] * 20)))


def test_what_a_source_depends_on_is_known_again(labelled: Path, tmp_path: Path) -> None:
    first = source_of(labelled)
    assert source_of(labelled).inputs == first.inputs
    for options in ({"seed": 1}, {"patch_size": 1}, {"scan": "raster"}, {"learns": "labels"}, {"image_size": "2"}):
        assert source_of(labelled, **options).inputs != first.inputs
    with np.load(labelled) as arrays:
        np.savez(tmp_path / "other.npz", images=arrays["images"], labels=arrays["labels"][::-1])
    assert source_of(tmp_path / "other.npz").inputs != first.inputs
    prepare_examples(first, tmp_path / "packed")
    with pytest.raises(KalmaGroveError, match="was prepared from something else"):
        prepare_examples(source_of(labelled, seed=1), tmp_path / "packed")


def test_images_that_go_while_they_are_read_are_noticed(tmp_path: Path) -> None:
    for number in range(9):
        Image.fromarray(np.full((2, 2), number, np.uint8)).save(tmp_path / f"{number}.png")
    found = source_of(tmp_path)
    (tmp_path / "4.png").unlink()
    with pytest.raises(KalmaGroveError, match="images were added or removed while they were read"):
        prepare_examples(found, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_progress_is_told(labelled: Path) -> None:
    told: list[tuple[str, int]] = []
    source_of(labelled, progress=lambda stage, count: told.append((stage, count)))
    assert told[0] == ("reading", 24) and told[-1] == ("reading", 60 * 24)


def test_the_format_is_read_again_from_json(labelled: Path) -> None:
    found = source_of(labelled)
    assert ImageFormat.from_dict(json.loads(json.dumps(found.schema))) == found.form


HOSTILE = [None, True, -1, 0, 2**70, 1.5, "x", [], [[]], {}, [None], ["a", "a", "a"], [1, 1, 1]]


@pytest.mark.parametrize("field", sorted(ImageFormat.__dataclass_fields__))
def test_a_damaged_schema_is_refused(labelled: Path, field: str) -> None:
    schema = source_of(labelled).schema
    without = {name: value for name, value in schema.items() if name != field}
    with pytest.raises(KalmaGroveError, match=f"lacks {field}"):
        ImageFormat.from_dict(without)
    for value in HOSTILE:
        allowed = {"is_fitted": (True,), "predicts_pixels": (True,), "caption_tokens": (None,)}
        if any(value is own for own in allowed.get(field, ())) or (field == "end_token" and value == 0):
            continue
        with pytest.raises(KalmaGroveError, match="its folder is damaged"):
            ImageFormat.from_dict(schema | {field: value})
    with pytest.raises(KalmaGroveError, match="trained on 'table', not on images"):
        ImageFormat.from_dict(schema | {"modality": "table"})


def test_parts_in_any_order_stand_one_behind_the_other(labelled: Path) -> None:
    form = replace(source_of(labelled).form, caption_tokens=(400, 401))
    image = image_part(form, np.zeros((4, 6, 1), np.uint8))
    made = sequences_of(form, [[label_part(form, "10"), caption_part(form, [7, 8]), image]])
    assert made.axes is not None
    line = made.axes[0, :7]
    assert torch.equal(line[:, 0], torch.arange(7.0)) and torch.equal(line[:, 0], line[:, 1])
    # The image begins behind them, and its patches lie on both axes.
    assert made.axes[0, 7].tolist() == [7, 7] and made.axes[0, -1].tolist() == [7 + 2, 7 + 3]
    assert to_patches(np.zeros((4, 6, 1)), form.places, 2).shape == (6, 4)
