"""`kalmagrove draw` and `predict` as a user types them, after a training on images: what they write, and mistakes."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kalmagrove.cli import main

TRAIN = [
    "--model.hidden_size", "16", "--model.num_hidden_layers", "1", "--model.head_dim", "8", "--loop.batch_size", "8",
    "--loop.context_length", "9", "--loop.device", "cpu", "--preset", "llama", "--tokens", "1k",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.Generator(np.random.PCG64(0))
    for name in ("cat", "dog"):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(20):
            pixels = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{number}.png")
    data = ["--data", str(folder / "pictures"), "--modality", "image", "--data.folder", str(folder / "data")]
    assert main(["train", *data, *TRAIN, "--out", str(folder / "run")]) == 0
    return folder / "run"


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_result_counts_bits_of_pixels(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    assert set(result["test"]["kinds"]) == {"token", "patch"}
    assert 1 < result["test"]["bits_per_byte"] < 12


def test_images_are_drawn_into_one_picture(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = answer(
        capsys, "draw", str(run), "--label", "cat", "--count", "5", "--out", str(tmp_path / "c.png")
    )
    assert code == 0, error
    assert out == f"{tmp_path / 'c.png'}: 5 images of 4 x 4 pixels\n"
    # Three columns and two rows, enlarged to 64 pixels an image.
    assert np.asarray(Image.open(tmp_path / "c.png")).shape == (16 * 9, 16 * 14, 3)
    words = ["draw", str(run), "--every_label", "--count", "3", "--batch_size", "2", "--json"]
    code, out, error = answer(capsys, *words, "--out", str(tmp_path / "all.png"))
    assert code == 0, error
    assert json.loads(out) == {"out": str(tmp_path / "all.png"), "images": 6, "label": None}
    code, _, _ = answer(capsys, *words, "--out", str(tmp_path / "again.png"))
    assert code == 0 and (tmp_path / "again.png").read_bytes() == (tmp_path / "all.png").read_bytes()


def test_the_beginning_of_an_image_is_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = np.zeros((4, 4, 3), np.uint8)
    begun[0] = 200
    Image.fromarray(begun).save(tmp_path / "begun.png")
    words = ["--begin", str(tmp_path / "begun.png"), "--kept", "0.5", "--count", "2", "--out", str(tmp_path / "d.png")]
    code, _, error = answer(capsys, "draw", str(run), *words)
    assert code == 0, error
    drawn = np.asarray(Image.open(tmp_path / "d.png"))[::16, ::16]
    for left in (0, 5):
        assert (drawn[0, left : left + 4] == 200).all() and (drawn[1, left : left + 4] == 0).all()


def test_labels_are_predicted_by_the_same_command_as_tables(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = answer(capsys, "predict", str(run), "--data", str(run.parent / "pictures"))
    assert code == 0, error
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 40 and rows[0]["image"] == "cat/0.png" and rows[0]["label"] == "cat"
    assert float(rows[0]["probabilities:cat"]) + float(rows[0]["probabilities:dog"]) == pytest.approx(1)
    assert "accuracy" in error and "bits a pixel" in error
    picture = str(run.parent / "pictures" / "dog" / "1.png")
    code, out, error = answer(capsys, "predict", str(run), "--data", picture, "--json")
    assert code == 0 and [row["image"] for row in json.loads(out)["rows"]] == ["1.png"]


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (["--out", "a.jpg"], 2, "--out a.jpg must end in .png"),
        (["--out", "nowhere/a.png"], 2, "there is no folder nowhere"),
        (["--out", "taken.png"], 2, "taken.png exists already"),
        (["--out", "a.png", "--count", "0"], 2, "need --count >= 1"),
        (["--out", "a.png", "--kept", "1"], 2, "--kept must be at least 0 and below 1"),
        (["--out", "a.png", "--kept", "0.5"], 2, "--kept is of the image that --begin names; leave it out"),
        (["--out", "a.png", "--label", "cat", "--every_label"], 2, "leave --label out"),
        (["--out", "a.png", "--label", "cow"], 1, "does not know the label 'cow'; it knows cat, dog"),
        (["--out", "a.png", "--begin", "missing.png"], 1, "there is no image file missing.png"),
        (["--out", "a.png", "--temprature", "1"], 2, "did you mean --temperature?"),
    ],
    ids=range(10),
)
def test_mistakes_are_one_line_and_leave_nothing(
    run: Path,
    words: list[str],
    code: int,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.png").write_text("")
    found, _, error = answer(capsys, "draw", str(run), *words)
    assert found == code and reason in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_half_of_a_begun_image_is_kept_where_nothing_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.full((4, 4, 3), 90, np.uint8)).save(tmp_path / "begun.png")
    for name, kept in (("usual", []), ("half", ["--kept", "0.5"]), ("none", ["--kept", "0"])):
        words = ["--begin", str(tmp_path / "begun.png"), *kept, "--out", str(tmp_path / f"{name}.png")]
        assert answer(capsys, "draw", str(run), "--count", "2", *words)[0] == 0
    usual, half, none = ((tmp_path / f"{name}.png").read_bytes() for name in ("usual", "half", "none"))
    assert usual == half != none


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--target", "label", "is for tables; of images the label is predicted: leave it out"),
        ("--quantiles", "0.1,0.9", "is for tables; of images the label is predicted: leave it out"),
        ("--orders", "8", "is for tables; of images the label is predicted: leave it out"),
        ("--seed", "0", "is for tables; of images the label is predicted: leave it out"),
        ("--max_new_tokens", "64", "is for answers to texts with images and rows; leave it out"),
    ],
)
def test_flags_that_do_nothing_for_images_are_refused(
    run: Path, flag: str, value: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = answer(capsys, "predict", str(run), "--data", str(run.parent / "pictures"), flag, value)
    assert (code, out, error) == (2, "", f"kalmagrove: {flag} {reason}\n")
