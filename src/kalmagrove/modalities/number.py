"""Numbers of a table's columns: read by their size, predicted as a distribution over bins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.modalities.modality import Modality

COLUMN, PLACE, SCALED, BIN = range(4)
"""What the features of a number are: its column, its place among the column's values (0 to 1), its distance from the
column's mean in standard deviations, and its bin."""


class NumberModality(Modality):
    """A number, in the terms of its column.

    It is read twice: as weights of the two nearest of some knots between the column's smallest and largest value, a
    piecewise linear embedding (Gorishniy et al., arXiv:2203.05556), and by its scaled size, which goes on beyond them.
    It is predicted as one of its column's bins, each of which holds about as many training values.

    Args:
        hidden_size: Width of the decoder.
        placeholder: The token that stands for a number.
        bins: How many bins each column has.
        knots: Of the embedding.
    """

    feature_size = 4

    def __init__(self, hidden_size: int, placeholder: int, *, bins: Sequence[int], knots: int = 24) -> None:
        super().__init__(hidden_size, placeholder)
        if not bins or min(bins) < 1 or knots < 2:
            raise ValueError(f"numbers need columns of at least one bin and at least 2 knots, got {bins} and {knots}")
        self.bins, self.knots = list(bins), knots
        self.embed_column = nn.Embedding(len(self.bins), hidden_size)
        self.value_proj = nn.Linear(knots + 2, hidden_size)
        self.head = nn.Linear(hidden_size, max(self.bins))
        self.column_bias = nn.Embedding(len(self.bins), max(self.bins))
        self.macs = (knots + 2 + max(self.bins)) * hidden_size

    def encode(self, features: Tensor) -> Tensor:
        place = features[:, PLACE].clamp(0, 1)[:, None] * (self.knots - 1)
        steps = torch.arange(self.knots, device=features.device)
        near = (1 - (place - steps).abs()).clamp(min=0)
        scaled = features[:, SCALED, None]
        sizes = torch.cat((near, scaled.clamp(-4, 4), scaled.asinh()), dim=1)
        encoded: Tensor = self.value_proj(sizes.to(self.value_proj.weight.dtype))
        return encoded + self.embed_column(features[:, COLUMN].long())

    def log_probabilities(self, hidden: Tensor, columns: Tensor) -> Tensor:
        """Of every bin, (elements, most bins), for ``hidden`` (elements, hidden) and ``columns`` (elements,)."""
        logits = self.head(hidden).float() + self.column_bias(columns).float()
        sizes = torch.tensor(self.bins, device=hidden.device)[columns]
        beyond = torch.arange(logits.shape[1], device=hidden.device) >= sizes[:, None]
        return logits.masked_fill(beyond, -torch.inf).log_softmax(dim=-1)

    def nats(self, hidden: Tensor, features: Tensor) -> Tensor:
        chances = self.log_probabilities(hidden, features[:, COLUMN].long())
        return F.nll_loss(chances, features[:, BIN].long(), reduction="none")
