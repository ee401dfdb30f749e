"""Images cut into patches: the order of the scan, the way back, and which sizes fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalmagrove.data.images.choices import SCANS
from kalmagrove.data.images.patches import choose_patch_size, from_patches, patch_places, to_patches
from kalmagrove.errors import UsageError

SIZES = [(1, 1), (1, 7), (5, 1), (2, 2), (3, 5), (4, 8), (6, 4), (8, 8), (7, 12), (16, 4)]


def test_z_order_is_that_of_its_picture() -> None:
    order = [tuple(place) for place in patch_places(4, 4, "z-order").tolist()]
    assert order == [
        (0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3),
        (2, 0), (2, 1), (3, 0), (3, 1), (2, 2), (2, 3), (3, 2), (3, 3),
    ]  # fmt: skip


def test_raster_order_is_row_by_row() -> None:
    assert patch_places(2, 3, "raster").tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_every_patch_comes_once_and_after_those_above_and_to_the_left(rows: int, columns: int, scan: str) -> None:
    places = [tuple(place) for place in patch_places(rows, columns, scan).tolist()]  # type: ignore[arg-type]
    assert sorted(places) == [(row, column) for row in range(rows) for column in range(columns)]
    when = {place: at for at, place in enumerate(places)}
    for row, column in places:
        assert row == 0 or when[row - 1, column] < when[row, column]
        assert column == 0 or when[row, column - 1] < when[row, column]


# Where a square is not whole, its run is shorter, and the next ones are not aligned.
@pytest.mark.parametrize(
    ("rows", "columns", "side"), [(*size, side) for size in SIZES for side in (2, 4) if not any(n % side for n in size)]
)
def test_runs_of_the_z_order_are_squares(rows: int, columns: int, side: int) -> None:
    blocks = patch_places(rows, columns, "z-order").reshape(-1, side * side, 2)
    for block in blocks:
        corner = block.min(axis=0)
        assert (corner % side == 0).all() and (block.max(axis=0) == corner + side - 1).all()


@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.sampled_from((1, 3)), st.sampled_from(SCANS), st.data()
)
def test_patches_become_the_image_again(rows: int, columns: int, size: int, channels: int, scan, data) -> None:
    count = data.draw(st.integers(1, 3))
    images = np.random.Generator(np.random.PCG64(rows)).integers(
        0, 256, (count, rows * size, columns * size, channels), dtype=np.uint8
    )
    places = patch_places(rows, columns, scan)
    patches = to_patches(images, places, size)
    assert patches.shape == (count, rows * columns, size * size * channels)
    assert np.array_equal(from_patches(patches, places, size, channels), images)
    assert np.array_equal(to_patches(images[0], places, size), patches[0])


def test_a_patch_holds_its_pixels_row_by_row_with_their_channels() -> None:
    image = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    patches = to_patches(image, patch_places(1, 2, "raster"), 2)
    assert patches[1].tolist() == [*image[0, 2], *image[0, 3], *image[1, 2], *image[1, 3]]


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (8, 8, 2),
        (28, 28, 4),
        (32, 32, 4),
        (64, 64, 8),
        (24, 36, 4),
        (224, 224, 14),
        (5, 7, 1),
        (1600, 1600, 32),
        (64, 8192, 16),
    ],
)
def test_the_patch_size_is_about_the_root_of_the_side(height: int, width: int, size: int) -> None:
    assert choose_patch_size(height, width, None) == size


@pytest.mark.parametrize(
    ("height", "width", "size", "message"),
    [
        (28, 28, 5, "patch_size 5 does not fit images of 28 x 28 pixels; sizes that do: 1, 2, 4, 7, 14, 28"),
        (28, 28, 0, "patch_size 0 does not fit"),
        (64, 64, 64, "patch_size 64 does not fit"),
        (427, 640, None, "427 x 640 pixels cannot be cut into at most 4096 square patches"),
        (128, 128, 1, "patch_size 1 does not fit images of 128 x 128 pixels; sizes that do: 2, 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(height: int, width: int, size: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_patch_size(height, width, size)
