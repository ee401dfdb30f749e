"""PNG and JPEG files: every usual kind becomes grey or RGB, and what cannot be read is named."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kalmagrove.data.images import reading
from kalmagrove.data.images.reading import read_image
from kalmagrove.errors import KalmaGroveError

COLOURS = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = COLOURS[:, :, 0]


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by its definition."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_colours_and_greys_are_read_as_they_are(tmp_path: Path) -> None:
    assert np.array_equal(read_image(saved(tmp_path / "c.png", Image.fromarray(COLOURS))), COLOURS)
    assert np.array_equal(read_image(saved(tmp_path / "g.PNG", Image.fromarray(GREY)))[:, :, 0], GREY)
    photograph = read_image(saved(tmp_path / "p.jpg", Image.fromarray(COLOURS), quality=95))
    assert photograph.shape == (5, 7, 3) and photograph.dtype == np.uint8


def test_black_and_white_becomes_grey(tmp_path: Path) -> None:
    found = read_image(saved(tmp_path / "b.png", Image.fromarray(GREY > 127)))
    assert np.array_equal(found[:, :, 0], np.where(GREY > 127, 255, 0))


def test_a_palette_becomes_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(GREY // 64, mode="L").convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    found = read_image(saved(tmp_path / "p.png", image))
    assert found.shape == (5, 7, 3)
    wanted = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])[np.asarray(image)]
    assert np.array_equal(found, wanted)


def test_what_is_transparent_is_laid_on_white(tmp_path: Path) -> None:
    alpha = np.full((5, 7), 255, np.uint8)
    alpha[0] = 0
    colour = read_image(saved(tmp_path / "c.png", Image.fromarray(np.dstack((COLOURS, alpha)))))
    assert (colour[0] == 255).all() and np.array_equal(colour[1:], COLOURS[1:])
    grey = read_image(saved(tmp_path / "g.png", Image.fromarray(np.dstack((GREY, alpha)))))
    assert (grey[0] == 255).all() and np.array_equal(grey[1:, :, 0], GREY[1:]) and grey.shape == (5, 7, 1)
    keyed = saved(tmp_path / "k.png", Image.fromarray(np.where(GREY > 127, 200, 10).astype(np.uint8)), transparency=10)
    assert set(np.unique(read_image(keyed))) == {200, 255}
    image = Image.fromarray(GREY // 64, mode="L").convert("P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette = read_image(saved(tmp_path / "p.png", image, transparency=bytes([0, 255, 255, 255])))
    assert (palette[GREY // 64 == 0] == 255).all()


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found = read_image(saved(tmp_path / "c.jpg", image, quality=95))
    assert found.shape == (8, 8, 3) and found[4, 4, 0] > 240 and found[4, 4, 1:].max() < 15


def test_a_photograph_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "turned.png", Image.fromarray(COLOURS), exif=exif)
    assert np.array_equal(read_image(path), np.rot90(COLOURS, 3))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "is no sound PNG or JPEG"),
        ("text.jpg", b"hello", "is no sound PNG or JPEG"),
        ("grey16.png", png(2, 1, 16, 0, b"\0" + bytes(4)), "has 16 bits a channel"),
        ("colour16.png", png(2, 1, 16, 2, b"\0" + bytes(12)), "has 16 bits a channel"),
        ("bomb.png", png(60_000, 60_000, 8, 0, b"\0"), "has more than 67 million pixels"),
        ("large.png", png(9_000, 9_000, 8, 0, b"\0"), "has more than 67 million pixels"),
        ("flipped.png", png(2, 1, 8, 0, b"\0\1\2").replace(b"x\x9cc", b"x\x9cd"), "is no sound PNG or JPEG"),
        ("cut.png", png(2, 1, 8, 0, b"\0\1\2")[:-20], "is no sound PNG or JPEG"),
    ],
    ids=lambda value: value.removesuffix(".png") if isinstance(value, str) else "",
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KalmaGroveError, match=reason) as caught:
        read_image(tmp_path / name)
    assert name in str(caught.value)


def test_half_a_photograph_is_refused(tmp_path: Path) -> None:
    noise = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / "half.jpg", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(KalmaGroveError, match=r"half\.jpg is no sound PNG or JPEG"):
        read_image(path)


def test_other_formats_under_these_names_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "gif.png", Image.fromarray(GREY), format="GIF")
    frames = [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)]
    saved(tmp_path / "moving.png", frames[0], save_all=True, append_images=frames[1:])
    saved(tmp_path / "float.png", Image.fromarray(GREY.astype(np.float32)), format="TIFF")
    with pytest.raises(KalmaGroveError, match=r"gif.png is no sound PNG or JPEG"):
        read_image(tmp_path / "gif.png")
    with pytest.raises(KalmaGroveError, match=r"moving.png is animated"):
        read_image(tmp_path / "moving.png")
    with pytest.raises(KalmaGroveError, match=r"float.png is no sound PNG or JPEG"):
        read_image(tmp_path / "float.png")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "missing.png", "."):
        with pytest.raises(KalmaGroveError, match="there is no image file"):
            read_image(tmp_path / name)


def test_without_pillow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(KalmaGroveError, match=r"install Pillow with: pip install 'kalmagrove\[vision\]'"):
        read_image(tmp_path / "any.png")


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(("PNG", "JPEG")), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6))
def test_changed_bytes_give_an_image_or_an_error_that_names_it(tmp_path: Path, kind: str, changes: list) -> None:
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, format=kind)
    content = bytearray(buffer.getvalue())
    for place, value in changes:
        content[place % len(content)] = value
    (tmp_path / "changed.png").write_bytes(content)
    try:
        found = read_image(tmp_path / "changed.png")
    except KalmaGroveError as error:
        assert "changed.png" in str(error) and "\n" not in str(error)
    else:
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[0] * found.shape[1] <= reading.MOST_PIXELS
