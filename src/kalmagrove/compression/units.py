"""Which units of a feed-forward can go: those whose output the others tell, and whose error nobody feels.

A unit is a number between the matrices of a feed-forward, a row of those that read and a column of the one that
writes. Where units are taken away, the writer gives from the others what it gave from all: its columns take over what
a regression of the lost units on the kept ones says. With A the second moment of the units and H their sensitivity
(see :mod:`kalmagrove.compression.statistics`), taking the set O away costs to second order

    trace(C H_OO) / 2,   C = (P_OO)^-1,   P = A^-1

C being what of O the others do not tell (the optimal brain surgeon, Hassibi and Stork 1993, with units in the place of
weights). Units go a few at a time, the cheapest first, and A and H follow. A unit taken away saves its numbers in all
of the matrices, where a rank of one matrix saves its own alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kalmagrove.compression.sites import Matrix

FEED_FORWARDS = (({"gate_proj", "up_proj"}, "down_proj"), ({"up_proj"}, "down_proj"), ({"c_fc"}, "c_proj"))
"""Names of the matrices that read and of the one that writes, between which nothing mixes units."""
STEPS = 96
"""Into so many steps the units are divided; larger ones are multiples of 16, which hardware likes."""
DAMPING = 1e-6
"""Of the mean power of a unit, added to all: units that are never active have no inverse."""


@dataclass(frozen=True)
class UnitOrder:
    """In which order units stay, and what that costs.

    Attributes:
        order: Numbers of the units, those that stay longest first, (units,).
        losses: Nats a token with the first 0 ... units of them, by the second order, (units + 1,) float64; between
            multiples of the step by a line.
    """

    order: Tensor
    losses: Tensor


def find_feed_forwards(matrices: Sequence[Matrix]) -> list[tuple[int, ...]]:
    """The feed-forwards whose units can be taken away: numbers of the matrices that read, and of the one that writes.

    Args:
        matrices: All of them, in the order in which they are computed.
    """
    parents: dict[str, list[int]] = {}
    for number, matrix in enumerate(matrices):
        parents.setdefault(matrix.name.rpartition(".")[0], []).append(number)
    found = []
    for members in parents.values():
        *readers, writer = members
        kinds = {matrices[number].kind for number in readers}, matrices[writer].kind
        units = matrices[writer].in_features
        if kinds in FEED_FORWARDS and all(matrices[number].out_features == units for number in readers):
            found.append(tuple(members))
    return found


def unit_step(units: int) -> int:
    """How many units go at a time."""
    return max(1, units // STEPS) if units < 16 * STEPS // 3 else 16 * max(1, round(units / STEPS / 16))


def order_units(inputs: Tensor, sensitivity: Tensor) -> UnitOrder:
    """Takes units away until a step is left.

    Args:
        inputs: A of what the writer reads, (units, units).
        sensitivity: H of it, (units, units).
    """
    moment, felt = inputs.double(), sensitivity.double()
    units, step = len(moment), unit_step(len(moment))
    scale = moment.diagonal().mean().clamp_min(1e-30)
    precision = torch.linalg.inv(moment + DAMPING * scale * torch.eye(units, dtype=moment.dtype, device=moment.device))
    left = torch.arange(units, device=moment.device)
    gone: list[Tensor] = []
    counts, losses = [units], [0.0]
    while len(left) > step:
        cost = felt.diagonal() / precision.diagonal()
        cheapest = cost.argsort()[: len(left) % step or step]
        is_kept = torch.ones(len(left), dtype=torch.bool, device=left.device)
        is_kept[cheapest] = False
        out, kept = cheapest, is_kept.nonzero()[:, 0]
        untold = torch.linalg.inv(precision[out][:, out])
        losses.append(losses[-1] + 0.5 * float((untold * felt[out][:, out]).sum()))
        # What the kept units say of the others: the writer's columns take it over, and are felt for both.
        told = -untold @ precision[out][:, kept]
        mixed = felt[out][:, kept].T @ told
        felt = felt[kept][:, kept] + mixed + mixed.T + told.T @ felt[out][:, out] @ told
        precision = precision[kept][:, kept] + precision[kept][:, out] @ told
        gone.append(left[out])
        left = left[kept]
        counts.append(len(left))
    # Of the last step nothing is known but that it costs more than what went before.
    counts.append(0)
    losses.append(2 * losses[-1] + 1.0)
    return UnitOrder(torch.cat([left, *reversed(gone)]), _on_all_counts(counts, losses).to(moment.device))


def _on_all_counts(counts: list[int], losses: list[float]) -> Tensor:
    """Losses of 0, 1, ... units from those of some counts, falling, by lines between them."""
    known, values = torch.tensor(counts).flip(0), torch.tensor(losses, dtype=torch.float64).flip(0)
    asked = torch.arange(counts[0] + 1)
    above = torch.searchsorted(known, asked).clamp_min(1)
    below = above - 1
    part = (asked - known[below]).double() / (known[above] - known[below])
    return values[below] + part * (values[above] - values[below])
