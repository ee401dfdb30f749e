"""Parameters as matrices, and back."""

import pytest
import torch

from kalmagrove.optim.layout import Layout


@pytest.mark.parametrize(
    ("layout", "shape", "whole", "parts"),
    [
        (Layout(), (4, 6), (4, 6), [(4, 6)]),
        (Layout(), (4, 3, 2, 5), (4, 30), [(4, 30)]),
        (Layout(transposed=True), (6, 4), (4, 6), [(4, 6)]),
        (Layout(split_sizes=(1, 3)), (4, 6), (4, 6), [(1, 6), (3, 6)]),
        (Layout(transposed=True, split_sizes=(1, 3)), (6, 4), (4, 6), [(1, 6), (3, 6)]),
        (Layout(stacked=True), (2, 4, 6), (2, 4, 6), [(2, 4, 6)]),
        (Layout(stacked=True, transposed=True, split_sizes=(1, 3)), (2, 6, 4), (2, 4, 6), [(2, 1, 6), (2, 3, 6)]),
    ],
    ids=str,
)
def test_there_and_back(layout: Layout, shape: tuple[int, ...], whole: tuple[int, ...], parts: list) -> None:
    layout.check(shape)
    tensor = torch.randn(shape)
    matrix = layout.whole(tensor)
    assert matrix.shape == whole and layout.inputs(shape) == whole[-1]
    cut = layout.parts(matrix)
    assert [tuple(part.shape) for part in cut] == parts
    assert torch.equal(layout.restore(cut, tensor), tensor)


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (Layout(), (4,), "at least 2 axes"),
        (Layout(stacked=True), (4, 6), "stacked matrices are 3-D"),
        (Layout(transposed=True), (4, 6, 3, 3), "only 2-D or stacked parameters can be transposed"),
        (Layout(split_sizes=(2, 3)), (4, 6), r"split_sizes \[2, 3\] make 5 outputs, but .* has 4"),
        (Layout(split_sizes=(2, 2), transposed=True), (4, 6), "has 6"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused(layout: Layout, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(shape)
