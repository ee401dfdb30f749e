"""Ranks under a budget, and who shares a basis."""

import pytest
import torch

from kalmagrove.compression.plan import Choice, Group, candidates, choose_forms, choose_ranks, merge_groups
from kalmagrove.compression.sites import Matrix
from kalmagrove.errors import UsageError


def group(member: int, in_features: int, out_features: int, decay: float) -> Group:
    values = torch.exp(-decay * torch.arange(in_features, dtype=torch.float64))
    losses = torch.cat((values.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)))
    return Group((member,), in_features, out_features, losses)


GROUPS = [group(0, 20, 30, 0.5), group(1, 20, 7, 0.1), group(2, 30, 20, 0.02)]
DENSE = sum(g.in_features * g.out_features for g in GROUPS)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 1.0])
def test_the_budget_is_met(keep: float) -> None:
    choices, _ = choose_ranks(GROUPS, int(keep * DENSE))
    used = sum(choice.parameters for choice in choices)
    assert used <= int(keep * DENSE)
    # What is left is less than one more rank anywhere.
    for choice in choices:
        if not choice.is_dense:
            larger = choice.group.next_rank(choice.rank)
            assert used + choice.group.parameters(larger) - choice.parameters > int(keep * DENSE)
    assert all(choice.is_dense for choice in choices) == (keep == 1.0)


def test_ranks_go_where_they_are_worth_most() -> None:
    steep, flat = group(0, 20, 20, 1.0), group(1, 20, 20, 0.01)
    (first, second), _ = choose_ranks([steep, flat], 500)
    assert first.rank < second.rank


def test_no_choice_of_the_same_size_has_less_loss() -> None:
    pair = [group(0, 8, 8, 0.3), group(1, 8, 8, 0.6)]
    choices, _ = choose_ranks(pair, 90)
    found = sum(float(c.group.losses[c.rank]) for c in choices)
    ranks = [*range(1, pair[0].largest_rank + 1), 8]
    others = [
        float(pair[0].losses[a] * (a < 8) + pair[1].losses[b] * (b < 8))
        for a in ranks
        for b in ranks
        if pair[0].parameters(a) + pair[1].parameters(b) <= sum(c.parameters for c in choices)
    ]
    assert found == pytest.approx(min(others))


def test_a_basis_is_counted_once_for_all_that_read_it() -> None:
    shared = Group((0, 1), 20, 60, GROUPS[0].losses)
    assert Choice(shared, 5).parameters == 5 * (20 - 5) + 5 * 60
    apart = 2 * Choice(group(0, 20, 30, 0.5), 5).parameters
    assert apart - Choice(shared, 5).parameters == 5 * (20 - 5)
    assert Choice(shared, 20).parameters == 20 * 60


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(UsageError, match="rank 1 everywhere"):
        choose_ranks(GROUPS, 10)


def layers(count: int) -> list[Matrix]:
    names = ("q_proj", "k_proj", "o_proj")
    return [
        Matrix(f"layers.{layer}.{name}", layer, 2 * layer + (name == "o_proj"), 20, 30)
        for layer in range(count)
        for name in names
    ]


def test_candidates_read_one_tensor_or_are_of_one_kind_in_neighbouring_layers() -> None:
    matrices = layers(3)
    groups = [group(number, 20, 30, 0.3) for number in range(len(matrices))]
    pairs = {(a.members[0], b.members[0]) for a, b in candidates(groups, matrices)}
    assert pairs == {(0, 1), (3, 4), (6, 7), (0, 3), (3, 6), (1, 4), (4, 7)}


def test_matrices_share_a_basis_exactly_where_that_is_cheaper() -> None:
    matrices = layers(2)[:2]
    groups = [group(number, 20, 30, 0.3) for number in range(2)]
    merged = merge_groups(groups, matrices, 1e-2, lambda members: 2 * groups[0].losses)
    assert [g.members for g in merged] == [(0, 1)]
    apart = merge_groups(groups, matrices, 1e-2, lambda members: 1e3 * groups[0].losses + 1.0)
    assert [g.members for g in apart] == [(0,), (1,)]


def units(members: tuple[int, ...], count: int, width: int, losses: torch.Tensor) -> Group:
    return Group(members, count, width, losses, torch.arange(count))


def test_the_form_that_costs_less_at_the_price_is_taken() -> None:
    bases = [group(0, 20, 30, 0.3), group(1, 30, 20, 0.3)]
    cheap, dear = (units((0, 1), 30, 40, torch.linspace(loss, 0, 31).double()) for loss in (0.01, 100.0))
    other = [[group(2, 20, 30, 0.3)]]
    budget = int(0.7 * (3 * 600))
    assert choose_forms([[bases, [cheap]], other], budget)[0] is cheap
    assert choose_forms([[bases, [dear]], other], budget)[:2] == bases


def test_units_are_chosen_in_steps_and_counted_in_all_matrices() -> None:
    own = units((0, 1), 960, 30, torch.linspace(1, 0, 961).double())
    assert own.step == 16 and own.next_rank(944) == 960 and own.next_rank(950) == 960
    choices, _ = choose_ranks([own, group(2, 20, 30, 0.3)], 20_000)
    assert choices[0].rank % 16 == 0 and choices[0].parameters == 30 * choices[0].rank
    assert sum(choice.parameters for choice in choices) <= 20_000
    assert Choice(own, 16).kept_units.tolist() == list(range(16))
    assert list(candidates([own, units((2, 3), 960, 30, own.losses)], layers(2))) == []


def test_factors_that_would_save_next_to_nothing_are_left_dense() -> None:
    own = group(0, 200, 300, 0.02)
    assert own.parameters(own.largest_rank) <= 0.8 * 200 * 300 < own.parameters(own.largest_rank + 1)
    assert own.next_rank(own.largest_rank) == 200
    chosen = [own.best_rank(price)[0] for price in torch.logspace(-9, 0, 60).tolist()]
    assert set(chosen) & set(range(1, own.largest_rank + 1)) and 200 in chosen
    assert not set(chosen) & set(range(own.largest_rank + 1, 200))
