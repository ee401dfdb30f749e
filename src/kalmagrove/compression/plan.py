"""Which matrices share a basis, and of what rank, and which units stay, so that parameters cost the least loss.

The losses of :mod:`kalmagrove.compression.factorise` and :mod:`kalmagrove.compression.units` are nats a token for every
basis and every feed-forward, so all ranks and all numbers of units stand on one scale: with a price of one parameter,
each takes the size at which loss + price x parameters is least, and the price is found by bisection. At full size a
matrix stays dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from kalmagrove.compression.sites import Matrix
from kalmagrove.compression.units import unit_step
from kalmagrove.errors import UsageError

WRITING = ("o_proj", "down_proj", "c_proj")
"""Their inputs are a layer's own heads and units, which mean nothing to other layers: they share no basis."""
BISECTIONS = 100
LARGEST_PART = 0.8
"""Of a matrix's parameters that its factors may hold; where more is wanted it stays dense."""


@dataclass(frozen=True)
class Group:
    """Matrices that share a basis, or a feed-forward whose units are chosen.

    Attributes:
        members: Their numbers in the list of all matrices, rising; of a feed-forward the last is the one that writes.
        in_features: Width of the basis, or the units.
        out_features: Of all matrices that read the basis together, or the numbers of a unit.
        losses: Nats a token that ranks 0 ... in_features cost.
        order: Of a feed-forward, its units, those that stay longest first; None of a basis. Its "rank" is how many of
            them stay.
    """

    members: tuple[int, ...]
    in_features: int
    out_features: int
    losses: Tensor
    order: Tensor | None = None

    @property
    def is_units(self) -> bool:
        """Whether it is a feed-forward whose units are chosen."""
        return self.order is not None

    @property
    def full_rank(self) -> int:
        """From which rank on a dense matrix is as small."""
        return self.in_features if self.is_units else min(self.in_features, self.out_features)

    @property
    def step(self) -> int:
        """Between ranks that can be chosen; the full one can be, too."""
        return unit_step(self.in_features) if self.is_units else 1

    def parameters(self, rank: int) -> int:
        """Of the basis and all its readers, or of the units that stay."""
        if rank >= self.full_rank:
            return self.in_features * self.out_features
        return rank * (self.out_features if self.is_units else self.in_features + self.out_features - rank)

    @property
    def largest_rank(self) -> int:
        """Below the full one: factors that hold nearly as much as the matrix would only be slower."""
        if self.is_units:
            return self.full_rank - 1
        both, most = self.in_features + self.out_features, LARGEST_PART * self.in_features * self.out_features
        return int((both - math.sqrt(both**2 - 4 * most)) / 2)

    def next_rank(self, rank: int) -> int:
        """The rank that can be chosen above another one."""
        return rank + self.step if rank + self.step <= self.largest_rank else self.full_rank

    def best_rank(self, price: float) -> tuple[int, float]:
        """The rank of the least loss + price x parameters, and that sum; a dense matrix loses nothing."""
        ranks = torch.arange(0, max(1, self.largest_rank + 1), self.step)[1:]
        ranks = torch.cat((ranks, torch.tensor([self.full_rank])))
        losses = self.losses[ranks].clone()
        losses[-1] = 0
        each = self.out_features if self.is_units else self.in_features + self.out_features - ranks
        sums = losses + price * (ranks * each).double()
        best = int(sums.argmin())
        return int(ranks[best]), float(sums[best])


@dataclass(frozen=True)
class Choice:
    """A group and its rank; at full rank its matrices stay dense."""

    group: Group
    rank: int

    @property
    def kept_units(self) -> Tensor:
        """Of a feed-forward: the units that stay, rising."""
        assert self.group.order is not None
        return self.group.order[: self.rank].sort().values

    @property
    def is_dense(self) -> bool:
        """Whether nothing is factorised or taken away."""
        return self.rank >= self.group.full_rank

    @property
    def parameters(self) -> int:
        """Of the basis and all its readers."""
        return self.group.parameters(self.rank)


def choose_ranks(groups: Sequence[Group], budget: int) -> tuple[list[Choice], float]:
    """Ranks whose parameters together are as many as the budget allows, and the price of a parameter.

    Args:
        groups: All of them.
        budget: Parameters of all bases and readers.

    Raises:
        UsageError: Even rank 1 everywhere is more.
    """
    least = sum(group.parameters(group.next_rank(0)) for group in groups)
    if budget < least:
        raise UsageError(f"rank 1 everywhere has {least:,} parameters, the budget is {budget:,}; keep more")
    price = _price_of(lambda price: _at_price(groups, price), budget)
    return _spend_rest(_at_price(groups, price), budget), price


def choose_forms(forms: Sequence[Sequence[Sequence[Group]]], budget: int) -> list[Group]:
    """The better form of every part of a model: bases of its matrices, or its units.

    Args:
        forms: Of each part, the groups of each form that it may take.
        budget: Parameters of all parts together.
    """

    def at_price(price: float) -> list[Group]:
        best = (min(part, key=lambda form: sum(g.best_rank(price)[1] for g in form)) for part in forms)
        return [group for form in best for group in form]

    return at_price(_price_of(lambda price: _at_price(at_price(price), price), budget))


def _price_of(choices_at: Callable[[float], list[Choice]], budget: int) -> float:
    """The lowest price of a parameter at which the choices are within the budget."""
    low, high = 1e-18, 1e6
    for _ in range(BISECTIONS):
        price = (low * high) ** 0.5
        if sum(choice.parameters for choice in choices_at(price)) > budget:
            low = price
        else:
            high = price
    return high


def merge_groups(
    groups: Sequence[Group],
    matrices: Sequence[Matrix],
    price: float,
    losses_of: Callable[[tuple[int, ...]], Tensor],
) -> list[Group]:
    """Lets groups share a basis as long as that lowers loss + price x parameters.

    Candidates are groups that read one tensor, and groups of the same kinds of matrices in neighbouring layers. The
    pair that gains most goes first (agglomerative clustering).

    Args:
        groups: Single matrices.
        matrices: All of them.
        price: Nats of a parameter.
        losses_of: Losses of ranks 0 ... in_features of members that share a basis.
    """
    merged = list(groups)
    gains: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, Group]] = {}
    while True:
        best: tuple[float, Group, Group, Group] | None = None
        for first, second in candidates(merged, matrices):
            key = first.members, second.members
            if key not in gains:
                both = tuple(sorted(first.members + second.members))
                union = Group(both, first.in_features, first.out_features + second.out_features, losses_of(both))
                apart = first.best_rank(price)[1] + second.best_rank(price)[1]
                gains[key] = apart - union.best_rank(price)[1], union
            gain, union = gains[key]
            if gain > 0 and (best is None or gain > best[0]):
                best = gain, first, second, union
        if best is None:
            return merged
        _, first, second, union = best
        merged = [union if group is first else group for group in merged if group is not second]


def candidates(groups: Sequence[Group], matrices: Sequence[Matrix]) -> Iterator[tuple[Group, Group]]:
    """Pairs of groups that may share a basis: of one site, or of the same kinds in layers that follow each other."""
    for first, second in combinations([group for group in groups if not group.is_units], 2):
        one, other = ([matrices[number] for number in group.members] for group in (first, second))
        sites = {matrix.site for matrix in (*one, *other)}
        if len(sites) == 1:
            yield first, second
            continue
        kinds = {matrix.kind for matrix in one}
        if kinds != {matrix.kind for matrix in other} or not kinds.isdisjoint(WRITING):
            continue
        layers, following = {matrix.layer for matrix in one}, {matrix.layer for matrix in other}
        if max(layers) + 1 == min(following) or max(following) + 1 == min(layers):
            yield first, second


def _at_price(groups: Sequence[Group], price: float) -> list[Choice]:
    return [Choice(group, group.best_rank(price)[0]) for group in groups]


def _spend_rest(choices: list[Choice], budget: int) -> list[Choice]:
    """Ranks one higher, the most loss for a parameter first, as long as the budget lasts."""
    left = budget - sum(choice.parameters for choice in choices)
    while True:
        best: tuple[float, int, int] | None = None
        for place, choice in enumerate(choices):
            if choice.is_dense:
                continue
            larger = choice.group.next_rank(choice.rank)
            cost = choice.group.parameters(larger) - choice.parameters
            gain = float(choice.group.losses[choice.rank] - choice.group.losses[larger])
            if cost <= left and (best is None or gain / max(1, cost) > best[0]):
                best = gain / max(1, cost), place, cost
        if best is None:
            return choices
        _, place, cost = best
        group = choices[place].group
        choices[place] = Choice(group, group.next_rank(choices[place].rank))
        left -= cost
