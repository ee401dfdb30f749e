"""Where pictures lie: folders by class, lists and arrays, with and without splits; and what is refused, by name."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kalmagrove.data.images.pictures import UNDIVIDED, Picture, find_pictures
from kalmagrove.errors import KalmaGroveError


def put(path: Path, level: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4), level, np.uint8)).save(path)
    return path


def pictures(path: Path, split: str = UNDIVIDED) -> list[tuple[str, str | None, int]]:
    """Name, label and level of each."""
    return [(p.name, p.label, int(p.load()[0, 0, 0])) for p in find_pictures(str(path))[split]()]


def refused(path: Path) -> str:
    with pytest.raises(KalmaGroveError) as caught:
        for found in find_pictures(str(path)).values():
            for picture in found():
                picture.load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_folders_of_a_folder_are_classes(tmp_path: Path) -> None:
    put(tmp_path / "dog/2.png", 2)
    put(tmp_path / "dog/old/1.jpeg", 1)
    put(tmp_path / "cat/1.png", 3)
    put(tmp_path / ".hidden/1.png")
    (tmp_path / "notes.txt").write_text("no image")
    names = [(name, label) for name, label, _ in pictures(tmp_path)]
    assert names == [("cat/1.png", "cat"), ("dog/2.png", "dog"), ("dog/old/1.jpeg", "dog")]


def test_a_flat_folder_and_one_picture_have_no_labels(tmp_path: Path) -> None:
    put(tmp_path / "b.png", 2)
    put(tmp_path / "a.png", 1)
    assert pictures(tmp_path) == [("a.png", None, 1), ("b.png", None, 2)]
    assert pictures(tmp_path / "b.png") == [("b.png", None, 2)]


def test_folders_named_after_splits_are_splits(tmp_path: Path) -> None:
    put(tmp_path / "train/cat/1.png", 1)
    put(tmp_path / "val/cat/2.png", 2)
    put(tmp_path / "Test/dog/3.png", 3)
    assert list(find_pictures(str(tmp_path))) == ["train", "valid", "test"]
    assert pictures(tmp_path, "valid") == [("val/cat/2.png", "cat", 2)]
    assert pictures(tmp_path, "test") == [("Test/dog/3.png", "dog", 3)]
    put(tmp_path / "other/4.png")
    assert "lies beside" in refused(tmp_path)


def test_train_alone_is_a_class_like_any_other(tmp_path: Path) -> None:
    put(tmp_path / "train/1.png")
    put(tmp_path / "ship/1.png")
    assert [label for _, label, _ in pictures(tmp_path)] == ["ship", "train"]


@pytest.mark.parametrize("name", ["a.gif", "b.WEBP", "c.tiff", "sub/d.bmp"])
def test_images_of_other_kinds_are_not_passed_over(tmp_path: Path, name: str) -> None:
    put(tmp_path / "1.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"GIF89a")
    assert f"{tmp_path / name} is neither PNG nor JPEG" in refused(tmp_path)


def test_an_image_in_no_class_beside_classes_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "cat/1.png")
    put(tmp_path / "stray.png")
    assert "stray.png is in no class, and" in refused(tmp_path)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    outside = put(tmp_path / "outside/secret.png")
    inside = put(tmp_path / "in/1.png", 7)
    (tmp_path / "in/2.png").symlink_to("1.png")
    assert [level for _, _, level in pictures(tmp_path / "in")] == [7, 7]
    (tmp_path / "in/3.png").symlink_to(outside)
    assert "3.png is a link out of" in refused(tmp_path / "in")
    (tmp_path / "in/3.png").unlink()
    (tmp_path / "in/class").symlink_to(inside.parent.parent / "outside")
    assert "class is a link to a folder" in refused(tmp_path / "in")


def test_nothing_and_something_else_are_named(tmp_path: Path) -> None:
    assert f"there is no file or folder {tmp_path / 'missing'}" in refused(tmp_path / "missing")
    assert "holds no PNG or JPEG file" in refused(tmp_path)
    (tmp_path / "table.csv").write_text("a,b\n")
    assert "table.csv is no folder, JSONL, .npz, PNG or JPEG" in refused(tmp_path / "table.csv")


def listed(folder: Path, *rows: Any, name: str = "list.jsonl") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def test_a_jsonl_names_images_labels_and_captions(tmp_path: Path) -> None:
    put(tmp_path / "images/1.png", 1)
    put(tmp_path / "2.png", 2)
    path = listed(
        tmp_path,
        {"image": "images/1.png", "label": 7, "caption": "one", "id": 5},
        "",
        {"image": "2.png", "label": None},
    )
    found: list[Picture] = list(find_pictures(str(path))[UNDIVIDED]())
    assert [(p.name, p.label, p.caption) for p in found] == [("images/1.png", "7", "one"), ("2.png", None, None)]
    assert pictures(path) == [("images/1.png", "7", 1), ("2.png", None, 2)]


def test_lists_named_after_splits_are_splits(tmp_path: Path) -> None:
    put(tmp_path / "1.png", 1)
    listed(tmp_path, {"image": "1.png"}, name="train.jsonl")
    np.savez(tmp_path / "test.npz", images=np.full((1, 4, 4), 2))
    assert pictures(tmp_path, "train") == [("1.png", None, 1)]
    assert pictures(tmp_path, "test") == [("test.npz[0]", None, 2)]


BAD_LINES: list[tuple[Any, str]] = [
    ("not JSON", "line 2 of .* is no JSON object"),
    ("[1]", "line 2 of .* is no JSON object"),
    ("[" * 100_000, "line 2 of .* is no JSON object"),
    ({"label": "cat"}, "line 2 of .* is no JSON object with a string"),
    ({"image": 3}, "line 2 of .* is no JSON object with a string"),
    ({"image": "../secret.png"}, "'../secret.png' in line 2 of .* is no path below"),
    ({"image": "a/../../secret.png"}, "is no path below"),
    ({"image": "/etc/passwd"}, "is no path below"),
    ({"image": "a\0b.png"}, "is no path below"),
    ({"image": "link.png"}, "is no path below"),
    ({"image": "missing.png"}, "there is no image file .*missing.png"),
    ({"image": "1.png", "label": 1.5}, "the label 1.5 in line 2"),
    ({"image": "1.png", "label": ""}, "the label '' in line 2"),
    ({"image": "1.png", "label": True}, "the label True in line 2"),
    ({"image": "1.png", "caption": 3}, "the caption in line 2"),
    ('{"image": "1.png", "caption": "\\ud800"}', "the caption in line 2"),
    ('{"image": "\\ud800.png"}', "line 2"),
    ("x" * (1 << 21), "line 2 of .* is longer than"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_lines_that_cannot_be_are_named(tmp_path: Path, row: Any, reason: str) -> None:
    folder = tmp_path / "here"
    put(folder / "1.png")
    put(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert re.search(reason, refused(listed(folder, {"image": "1.png"}, row)))


def test_an_array_has_levels_and_labels(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 5 * 3).reshape(2, 3, 5, 3).astype(float)
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=np.array(["cat", "dog"]))
    found = [(p.label, p.load()) for p in find_pictures(str(tmp_path / "a.npz"))[UNDIVIDED]()]
    assert [label for label, _ in found] == ["cat", "dog"]
    assert np.array_equal(np.stack([pixels for _, pixels in found]), images)
    np.savez(tmp_path / "b.npz", images=np.ones((2, 3, 5), bool), labels=np.array([3, -1]))
    assert pictures(tmp_path / "b.npz") == [("b.npz[0]", "3", 1), ("b.npz[1]", "-1", 1)]


class _Unpickled:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch unpickled",)


BAD_ARRAYS: list[tuple[dict[str, np.ndarray], str]] = [
    ({"labels": np.zeros(3)}, "holds no array named images"),
    ({"images": np.zeros((3, 4))}, "have the shape"),
    ({"images": np.zeros((3, 4, 4, 2))}, "have the shape"),
    ({"images": np.zeros((0, 4, 4))}, "have the shape"),
    ({"images": np.zeros((1, 4, 4), complex)}, "complex128"),
    ({"images": np.full((1, 4, 4), 0.5)}, "image 0 of .* no whole numbers"),
    ({"images": np.full((1, 4, 4), np.nan)}, "image 0 of .* no whole numbers"),
    ({"images": np.full((1, 4, 4), -1)}, "image 0 of .* no whole numbers"),
    ({"images": np.full((1, 4, 4), 256)}, "image 0 of .* no whole numbers"),
    ({"images": np.full((1, 4, 4), 2**40)}, "image 0 of .* no whole numbers"),
    ({"images": np.asfortranarray(np.zeros((2, 4, 4)))}, "Fortran order"),
    ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(3, int)}, r"labels of .* have the shape \(3,\), for 2"),
    ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(2)}, "labels of .* float64"),
    ({"images": np.zeros((2, 4, 4)), "labels": np.array(["a", ""])}, "label 1 of .* is empty"),
    ({"images": np.array([_Unpickled()])}, "images of .* Python objects"),
]


@pytest.mark.parametrize(("arrays", "reason"), BAD_ARRAYS, ids=range(len(BAD_ARRAYS)))
def test_arrays_that_cannot_be_are_named(
    tmp_path: Path, arrays: dict[str, np.ndarray], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    assert re.search(reason, refused(tmp_path / "a.npz"))
    assert not (tmp_path / "unpickled").exists()


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    images = np.random.Generator(np.random.PCG64(0)).integers(0, 9, (9, 8, 8), dtype=np.uint8)
    np.savez_compressed(tmp_path / "a.npz", images=images)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    assert "a.npz is no sound .npz" in refused(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"")
    assert "a.npz is no sound .npz" in refused(tmp_path / "a.npz")
    # A changed pixel is a sound pixel: only the sum over all of them tells.
    np.savez(tmp_path / "a.npz", images=images)
    whole = (tmp_path / "a.npz").read_bytes()
    at = whole.index(images[8].tobytes())
    (tmp_path / "a.npz").write_bytes(whole[:at] + bytes([images[8, 0, 0] + 1]) + whole[at + 1 :])
    assert "a.npz is no sound .npz" in refused(tmp_path / "a.npz")


def test_a_header_that_promises_too_much_is_found_out(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((1, 4, 4), np.uint8))
    content = (tmp_path / "one.npy").read_bytes().replace(b"(1, 4, 4)", b"(9, 4, 4)")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", content)
    assert "a.npz is cut short" in refused(tmp_path / "a.npz")
