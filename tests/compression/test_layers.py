"""A compact layer is the product of its factors, and the optimiser sees what each of them multiplies."""

import torch

from kalmagrove.nn.compact import CompactBasis, CompactLinear
from kalmagrove.nn.grove import composed_weights
from kalmagrove.optim.groups import kalma_groups
from kalmagrove.optim.kalma import Kalma

IN, OUT, RANK = 13, 7, 5


def layer(*, rank: int = RANK, bias: bool = True) -> CompactLinear:
    generator = torch.Generator().manual_seed(0)
    basis = CompactBasis(rank, IN)
    made = CompactLinear(IN, OUT, basis, bias=bias)
    with torch.no_grad():
        basis.order.copy_(torch.randperm(IN, generator=generator))
        for parameter in (*made.parameters(), *basis.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    # As the model that it is part of would.
    made.owner = basis
    return made


def rows() -> torch.Tensor:
    return torch.randn(2, 11, IN, generator=torch.Generator().manual_seed(1))


def test_it_gives_what_the_merged_matrix_gives() -> None:
    for made in (layer(), layer(bias=False), layer(rank=IN), layer(rank=1)):
        expected = torch.nn.functional.linear(rows(), made.merged_weight(), made.bias)
        assert torch.allclose(made(rows()), expected, atol=1e-5)
        with torch.no_grad(), composed_weights(made):
            assert torch.allclose(made(rows()), expected, atol=1e-5)
        assert torch.linalg.matrix_rank(made.merged_weight()) == min(made.rank, OUT)


def test_it_has_no_more_numbers_than_its_rank_needs() -> None:
    made = layer(bias=False)
    assert sum(p.numel() for p in made.parameters()) == RANK * (IN + OUT - RANK) < IN * OUT


def test_gradients_are_those_of_the_merged_matrix() -> None:
    made = layer()
    made(rows()).square().sum().backward()
    found = [p.grad.clone() for p in made.parameters()]
    made.zero_grad()
    torch.nn.functional.linear(rows(), made.merged_weight(), made.bias).square().sum().backward()
    for gradient, parameter in zip(found, made.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-2, rtol=1e-4)


def test_the_optimiser_is_told_what_each_matrix_multiplies() -> None:
    made = layer()
    basis = made.owner
    told = {id(parameter): read for parameter, read in made.weight_inputs(rows())}
    assert set(told) == {id(made.left), id(basis.rest)}
    from_rest = torch.nn.functional.linear(told[id(basis.rest)], basis.rest)
    inner = rows()[..., basis.order[:RANK]] + from_rest
    assert torch.allclose(inner, told[id(made.left)], atol=1e-5)
    assert Kalma(kalma_groups(made)).attach(made) == 2


def test_an_adaptor_starts_as_nothing_and_is_added_to_the_core() -> None:
    made = layer()
    before = made(rows())
    made.add_adaptor("legal")
    made.set_adaptor("legal")
    assert torch.allclose(made(rows()), before, atol=1e-5)
    with torch.no_grad():
        made.adaptors["legal"].add_(0.1)
    expected = made.left @ (torch.eye(RANK) + 0.1) @ made.owner.weight
    assert torch.allclose(made(rows()), torch.nn.functional.linear(rows(), expected, made.bias), atol=1e-4)
    made.set_adaptor(None)
    assert torch.equal(made(rows()), before)
