"""Which units of a feed-forward go, and what that costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kalmagrove.compression.direct import refitted_writer
from kalmagrove.compression.sites import Matrix
from kalmagrove.compression.units import find_feed_forwards, order_units, unit_step

UNITS = 24


def moment(seed: int, units: int = UNITS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3 * units, units, generator=generator, dtype=torch.float64)
    mix = torch.randn(units, units, generator=generator, dtype=torch.float64) / units**0.5
    return (rows @ mix).T @ (rows @ mix) / len(rows)


def loss_of_keeping(kept: Tensor, inputs: Tensor, sensitivity: Tensor) -> float:
    """trace(H E[(x - x')(x - x')^T]) / 2 with x' all units as the kept ones tell them."""
    told = refitted_writer(torch.eye(len(inputs), dtype=torch.float64), inputs, kept)
    change = torch.eye(len(inputs), dtype=torch.float64) - told
    return 0.5 * float(torch.trace(sensitivity @ change @ inputs @ change.T))


def test_the_loss_of_a_size_is_that_of_its_units_with_the_writer_fitted_anew() -> None:
    inputs, sensitivity = moment(0), moment(1)
    found = order_units(inputs, sensitivity)
    assert sorted(found.order.tolist()) == list(range(UNITS)) and float(found.losses[UNITS]) == 0
    for count in range(1, UNITS):
        expected = loss_of_keeping(found.order[:count].sort().values, inputs, sensitivity)
        assert float(found.losses[count]) == pytest.approx(expected, rel=1e-2, abs=1e-5)
    assert bool((found.losses.diff() < 0).all())


def test_units_that_are_chosen_cost_less_than_others() -> None:
    inputs, sensitivity = moment(2), moment(3)
    found, generator = order_units(inputs, sensitivity), torch.Generator().manual_seed(0)
    others = [
        loss_of_keeping(torch.randperm(UNITS, generator=generator)[:12].sort().values, inputs, sensitivity)
        for _ in range(50)
    ]
    assert float(found.losses[12]) < 0.9 * min(others)


def test_what_the_others_tell_or_nobody_feels_goes_first() -> None:
    inputs, sensitivity = moment(4), moment(5)
    # Unit 3 is twice unit 7, and nobody feels unit 11.
    inputs[3], inputs[:, 3] = 2 * inputs[7], 2 * inputs[:, 7]
    inputs[3, 3] = 4 * inputs[7, 7]
    sensitivity[11], sensitivity[:, 11] = 0, 0
    found = order_units(inputs, sensitivity)
    gone = set(found.order[UNITS - 2 :].tolist())
    assert 11 in gone and gone & {3, 7}
    assert float(found.losses[UNITS - 2]) < 1e-4 * float(found.losses[UNITS - 4])


def test_units_that_were_never_active_are_no_obstacle() -> None:
    inputs, sensitivity = moment(6), moment(7)
    inputs[5], inputs[:, 5] = 0, 0
    found = order_units(inputs, sensitivity)
    assert bool(torch.isfinite(found.losses).all()) and int(found.order[-1]) == 5


def test_many_units_go_in_steps_that_hardware_likes() -> None:
    assert [unit_step(units) for units in (5, 56, 256, 511)] == [1, 1, 2, 5]
    assert all(unit_step(units) % 16 == 0 for units in (512, 1536, 3072, 8192, 11008))
    units = 514
    found = order_units(moment(8, units), moment(9, units))
    assert len(found.losses) == units + 1 and bool((found.losses.diff() < 0).all())
    assert sorted(found.order.tolist()) == list(range(units))


def feed_forward(kinds: list[str], inner: list[int], parent: str = "layers.0.mlp") -> list[Matrix]:
    *readers, writer = kinds
    made = [Matrix(f"{parent}.{kind}", 0, 0, 8, units) for kind, units in zip(readers, inner, strict=True)]
    return [*made, Matrix(f"{parent}.{writer}", 0, 1, inner[0], 8)]


def test_feed_forwards_are_known_by_their_names_and_widths() -> None:
    attention = feed_forward(["c_attn", "c_proj"], [24], "layers.0.attn")
    gated = feed_forward(["gate_proj", "up_proj", "down_proj"], [20, 20])
    assert find_feed_forwards([*attention, *gated]) == [(2, 3, 4)]
    assert find_feed_forwards(feed_forward(["c_fc", "c_proj"], [32])) == [(0, 1)]
    assert find_feed_forwards(feed_forward(["up_proj", "down_proj"], [32])) == [(0, 1)]
    assert find_feed_forwards(feed_forward(["gate_proj", "up_proj", "down_proj"], [20, 10])) == []
    assert find_feed_forwards(feed_forward(["gate_up_proj", "down_proj"], [20])) == []
