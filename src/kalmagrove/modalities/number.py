"""Numbers of a table's columns: read by their size, predicted as a distribution over bins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalmagrove.modalities.modality import Modality

KNOTS = 24
"""Of the embedding, of which a column's own are the first ones; and logits that are free: a column with at most so many
bins has one for each."""
COLUMN, PLACE, SCALED, BIN = range(4)
"""What the features of a number are: its column, its place among the column's values (0 to 1), its distance from the
column's median in standard deviations told from the quartiles, and its bin."""


class NumberModality(Modality):
    """A number, in the terms of its column.

    It is read twice: as weights of the two nearest of some knots between the column's smallest and largest value, a
    piecewise linear embedding (Gorishniy et al., arXiv:2203.05556), and by its scaled size, which goes on beyond them.
    All columns share this embedding, each with a gain and an offset of its own.
    It is predicted as one of its column's bins, each of which holds about as many training values. The logits of a
    column with many bins are linear between a few of them, so that neighbouring bins learn from each other, and bins of
    different columns that are at the same place among their column's values.

    Args:
        hidden_size: Width of the decoder.
        placeholder: The token that stands for a number.
        bins: How many bins each column has.
    """

    feature_size = 4

    def __init__(self, hidden_size: int, placeholder: int, *, bins: Sequence[int]) -> None:
        super().__init__(hidden_size, placeholder)
        if not bins or min(bins) < 1:
            raise ValueError(f"numbers need columns of at least one bin, got {bins}")
        self.bins = list(bins)
        self.embed_column = nn.Embedding(len(self.bins), hidden_size)
        self.column_gain = nn.Embedding(len(self.bins), hidden_size)
        self.value_proj = nn.Linear(KNOTS + 2, hidden_size)
        self.head = nn.Linear(hidden_size, KNOTS)
        self.column_bias = nn.Embedding(len(self.bins), max(self.bins))
        self.macs = (2 * KNOTS + 2) * hidden_size

    def encode(self, features: Tensor) -> Tensor:
        place = features[:, PLACE].clamp(0, 1)[:, None] * (KNOTS - 1)
        steps = torch.arange(KNOTS, device=features.device)
        near = (1 - (place - steps).abs()).clamp(min=0)
        scaled = features[:, SCALED, None]
        sizes = torch.cat((near, scaled.clamp(-4, 4), scaled.asinh()), dim=1)
        encoded: Tensor = self.value_proj(sizes.to(self.value_proj.weight.dtype))
        columns = features[:, COLUMN].long()
        return encoded * (1 + self.column_gain(columns)) + self.embed_column(columns)

    def log_probabilities(self, hidden: Tensor, columns: Tensor) -> Tensor:
        """Of every bin, (elements, most bins), for ``hidden`` (elements, hidden) and ``columns`` (elements,)."""
        sizes = torch.tensor(self.bins, device=hidden.device)[:, None]
        steps = torch.arange(max(self.bins), device=hidden.device)
        # Where each bin of each column lies among the free logits, (columns, most bins).
        places = steps * torch.where(sizes > KNOTS, (KNOTS - 1) / (sizes - 1).clamp(min=1), 1.0)
        below = places.floor().clamp(max=KNOTS - 2)
        part = (places - below).clamp(max=1)[columns]
        index = below.long()[columns]
        free = self.head(hidden).float()
        logits = free.gather(1, index) * (1 - part) + free.gather(1, index + 1) * part
        logits = logits + self.column_bias(columns).float()
        return logits.masked_fill(steps >= sizes[columns], -torch.inf).log_softmax(dim=-1)

    def nats(self, hidden: Tensor, features: Tensor) -> Tensor:
        chances = self.log_probabilities(hidden, features[:, COLUMN].long())
        return F.nll_loss(chances, features[:, BIN].long(), reduction="none")
