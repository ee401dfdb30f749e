"""Parameters as the matrices that they hold: fused projections, transposed layers, convolutions, stacked experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a parameter holds its matrices.

    Attributes:
        transposed: The parameter is (inputs, outputs), as in the Conv1D of transformers.
        split_sizes: Outputs of each of the matrices that are fused into one, as query, key and value are; None is one.
        stacked: A 3-D parameter holds a matrix for each expert; otherwise all axes but the first are inputs
            (convolutions).
    """

    transposed: bool = False
    split_sizes: Sequence[int] | None = None
    stacked: bool = False

    def check(self, shape: Sequence[int]) -> None:
        """Whether a parameter of this shape can be cut so.

        Raises:
            ValueError: It cannot.
        """
        if len(shape) < 2:
            raise ValueError(f"a matrix has at least 2 axes, got shape {tuple(shape)}; use adamw")
        if self.stacked and len(shape) != 3:
            raise ValueError(f"stacked matrices are 3-D parameters, got shape {tuple(shape)}")
        if self.transposed and len(shape) > 2 and not self.stacked:
            raise ValueError(f"only 2-D or stacked parameters can be transposed, got shape {tuple(shape)}")
        outputs = shape[-1] if self.transposed else shape[-2] if self.stacked else shape[0]
        if self.split_sizes is not None and sum(self.split_sizes) != outputs:
            raise ValueError(
                f"split_sizes {list(self.split_sizes)} make {sum(self.split_sizes)} outputs, but the parameter of "
                f"shape {tuple(shape)} has {outputs}"
            )

    def inputs(self, shape: Sequence[int]) -> int:
        """What its matrices multiply: the number of features."""
        if self.transposed:
            return shape[-2]
        return shape[-1] if self.stacked else torch.Size(shape[1:]).numel()

    def whole(self, tensor: Tensor) -> Tensor:
        """(outputs, inputs), or (experts, outputs, inputs)."""
        tensor = tensor if self.stacked or tensor.ndim == 2 else tensor.flatten(1)
        return tensor.mT if self.transposed else tensor

    def parts(self, whole: Tensor) -> list[Tensor]:
        """The matrices that are whitened alone."""
        return [whole] if self.split_sizes is None else list(whole.split(list(self.split_sizes), dim=-2))

    def restore(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """The parts as the parameter ``like`` holds them."""
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-2)
        return (joined.mT if self.transposed else joined).reshape_as(like)
