"""Sequences whose tokens may carry features: placeholders for numbers, patches of images and the like."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences, in the place of a tensor of tokens: it is cut, moved and counted like one.

    Attributes:
        tokens: (batch, sequence), int64; the token of a modality's element is its placeholder.
        weights: (batch, sequence), 1 where a token is to be predicted and 0 where it is only read.
        features: For each modality (batch, sequence, size): what its placeholders stand for, zero at other tokens.
        axes: Row and column of each token, (batch, sequence, 2), for rotary positions in two dimensions: words have
            twice the same; None where all tokens are in one line.
    """

    tokens: Tensor
    weights: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    axes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Sequences:
        """Some rows, or some rows and some of their tokens."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> Sequences:
        """The same on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def split(self, size: int) -> list[Sequences]:
        """Parts of at most ``size`` rows."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def numel(self) -> int:
        """Tokens that are to be predicted."""
        return int(self.weights.sum())

    def _map(self, change: Any) -> Sequences:
        return Sequences(
            change(self.tokens),
            change(self.weights),
            {name: change(tensor) for name, tensor in self.features.items()},
            None if self.axes is None else change(self.axes),
        )
