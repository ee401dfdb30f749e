"""Grove's algebra, its sharing and its adaptors."""

import copy

import pytest
import torch
from torch import nn

from kalmagrove.nn.grove import Basis, GroveBank, GroveLinear, composed_weights, compute_path

CASES = {
    "full-right": {"rank": 7, "left": "identity", "right": [Basis(7, 13)], "core": "diagonal"},
    "full-left": {"rank": 13, "left": [Basis(7, 13)], "right": "identity", "core": "diagonal"},
    "two-pieces": {"rank": 6, "left": "private", "right": [Basis(2, 13), Basis(4, 13)], "core": "none"},
    "letter": {"rank": 5, "left": [Basis(7, 5)], "right": [Basis(5, 13)], "core": "dense"},
    "blocks": {"rank": 6, "left": [Basis(7, 6)], "right": "private", "core": "block", "block_size": 3},
    "blocks-right": {"rank": 7, "left": "identity", "right": "private", "core": "block", "block_size": 7},
    "mixed-right": {"rank": 21, "left": "identity", "right": [Basis(7, 13) for _ in range(3)], "core": "diagonal"},
    "mixed-left": {"rank": 26, "left": [Basis(7, 13) for _ in range(2)], "right": "identity", "core": "diagonal"},
    "dense-right": {"rank": 7, "left": "identity", "right": [Basis(7, 13)], "core": "dense"},
}


def grove(name: str) -> GroveLinear:
    torch.manual_seed(3)
    layer = GroveLinear(13, 7, **CASES[name])  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("name", CASES)
def test_the_forward_is_the_product_with_the_merged_weight(name: str) -> None:
    layer = grove(name)
    x = torch.randn(3, 5, 13)
    assert torch.allclose(layer(x), x @ layer.merged_weight().T, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_merged_weight_is_u_sigma_v_transposed(name: str) -> None:
    layer = grove(name)
    left, right, core = layer.left_factor(), layer.right_factor(), layer.effective_core()
    u = torch.eye(7).repeat(1, layer.rank // 7) if left is None else left
    vt = torch.eye(13).repeat(layer.rank // 13, 1) if right is None else right
    sigma = torch.eye(layer.rank) if core is None else core
    if sigma.ndim == 1:
        sigma = torch.diag(sigma)
    if sigma.ndim == 3:
        sigma = torch.block_diag(*sigma)
    assert torch.allclose(layer.merged_weight(), u @ sigma @ vt, atol=1e-5)


def test_full_rank_with_one_layer_a_group_equals_a_linear_layer() -> None:
    linear = nn.Linear(13, 7, bias=False)
    bank = GroveBank(7, 13, num_layers=1, group_size=1, sharing="group", rank_axis=0)
    layer = GroveLinear(13, 7, 7, left="identity", right=bank.of_layer(0))
    layer._right[0].weight.data.copy_(linear.weight.data)
    x = torch.randn(4, 13)
    assert torch.equal(layer(x), linear(x))
    layer(x).sum().backward()
    linear(x).sum().backward()
    assert torch.equal(layer._right[0].weight.grad, linear.weight.grad)


@pytest.mark.parametrize("name", CASES)
def test_each_matrix_is_given_the_input_that_it_multiplies(name: str) -> None:
    """The gradient of a matrix is the output's slope times its input: compare with autograd on a linear loss."""
    layer = grove(name)
    # Fewer rows than any matrix is wide, so that the inputs do not span everything.
    x = torch.randn(3, 13)
    layer(x).sum().backward()
    for parameter, seen in layer.weight_inputs(x):
        gradient = parameter.grad
        assert gradient is not None
        # The row space of the gradient lies in the span of the inputs that the matrix has seen.
        solution = torch.linalg.lstsq(seen.detach().T, gradient.T).solution
        assert torch.allclose(seen.detach().T @ solution, gradient.T, atol=1e-4)
        assert seen.shape == (3, parameter.shape[1])


def test_layers_of_a_group_share_one_tensor_and_other_groups_do_not() -> None:
    bank = GroveBank(6, 13, num_layers=5, group_size=2, sharing="group", rank_axis=0)
    assert bank.of_layer(0)[0] is bank.of_layer(1)[0]
    assert bank.of_layer(1)[0] is not bank.of_layer(2)[0]
    assert len(bank.bases) == 3


def test_a_cycle_uses_its_bases_in_turns() -> None:
    bank = GroveBank(6, 13, num_layers=5, group_size=2, sharing="cycle", rank_axis=0)
    layers = [bank.of_layer(layer)[0] for layer in range(5)]
    assert len(bank.bases) == 3
    assert layers[0] is layers[3] and layers[1] is layers[4]
    assert len({id(basis) for basis in layers}) == 3


def test_a_mixture_begins_as_a_cycle_and_each_basis_serves_every_layer() -> None:
    bank = GroveBank(7, 13, num_layers=4, group_size=2, sharing="mix", rank_axis=0)
    layers = [GroveLinear(13, 7, 14, left="identity", right=bank.of_layer(layer)) for layer in range(4)]
    for index, layer in enumerate(layers):
        assert torch.equal(layer.merged_weight(), bank.bases[index % 2].weight)
        assert {id(basis) for basis in layer._right} == {id(basis) for basis in bank.bases}


def test_a_band_shares_pieces_with_the_neighbours_and_keeps_their_place() -> None:
    bank = GroveBank(6, 13, num_layers=4, group_size=2, sharing="band", rank_axis=0)
    layers = [bank.of_layer(layer) for layer in range(4)]
    assert len(bank.bases) == 5
    assert layers[0][1] is layers[1][1] and layers[0][0] is not layers[1][0]
    assert layers[1][0] is layers[2][0]
    assert all(piece.weight.shape == (3, 13) for pieces in layers for piece in pieces)


def test_shared_bases_are_not_parameters_of_the_layers_and_survive_a_deep_copy() -> None:
    bank = GroveBank(7, 13, num_layers=2, group_size=2, sharing="group", rank_axis=0)
    model = nn.ModuleDict(
        {"bank": bank} | {str(i): GroveLinear(13, 7, 7, left="identity", right=bank.of_layer(i)) for i in range(2)}
    )
    assert sorted(name for name, _ in model.named_parameters()) == ["0.core", "1.core", "bank.bases.0.weight"]
    copied = copy.deepcopy(model)
    assert copied["0"]._right[0] is copied["1"]._right[0] is copied["bank"].bases[0]
    assert copied["0"]._right[0] is not model["0"]._right[0]


@pytest.mark.parametrize("name", CASES)
def test_an_adaptor_changes_nothing_until_it_is_trained_and_leaves_the_base_alone(name: str) -> None:
    layer = grove(name)
    x = torch.randn(2, 13)
    base = layer(x)
    layer.add_adaptor("legal")
    layer.set_adaptor("legal")
    assert torch.allclose(layer(x), base, atol=1e-5)
    layer.adaptors["legal"].data.add_(0.5)
    assert not torch.allclose(layer(x), base, atol=1e-3)
    assert torch.allclose(layer(x), x @ layer.merged_weight().T, atol=1e-4)
    layer.set_adaptor(None)
    assert torch.equal(layer(x), base)


def test_adaptor_names_are_checked() -> None:
    layer = grove("letter")
    layer.add_adaptor("legal")
    with pytest.raises(ValueError, match="'legal' exists already"):
        layer.add_adaptor("legal")
    with pytest.raises(ValueError, match="no adaptor 'medical'; there are: legal"):
        layer.set_adaptor("medical")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 14, "left": "private", "right": "private"}, "rank must be between 1 and 13"),
        ({"rank": 7, "left": "identity", "right": "identity"}, "cannot both be the identity"),
        ({"rank": 6, "left": "identity", "right": "private"}, "rank = out_features = 7"),
        ({"rank": 14, "left": "identity", "right": "private", "core": "dense"}, "added up by a diagonal core"),
        ({"rank": 6, "left": "private", "right": "identity"}, "rank = in_features = 13"),
        ({"rank": 6, "left": "private", "right": [Basis(5, 13)]}, "do not add up to the rank"),
        ({"rank": 6, "left": "private", "right": "private", "core": "block", "block_size": 4}, "not divisible"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroveLinear(13, 7, **options)  # type: ignore[arg-type]


def test_a_band_needs_a_divisible_rank() -> None:
    with pytest.raises(ValueError, match="rank 7 is not divisible by group_size 2"):
        GroveBank(7, 13, num_layers=3, group_size=2, sharing="band", rank_axis=0)


@pytest.mark.parametrize(
    ("tokens", "rank", "composed_before", "path"),
    [
        (1, 16, False, "factored"),
        (1, 16, True, "factored"),
        (1, 48, True, "composed"),
        (1, 48, False, "factored"),
        (4096, 16, False, "factored"),
        (4096, 33, False, "composed"),
        (4096, 32, False, "factored"),
    ],
)
def test_the_cheaper_path_is_chosen_by_multiplications(
    tokens: int, rank: int, composed_before: bool, path: str
) -> None:
    assert compute_path(tokens, 64, 64, rank, composed_before=composed_before) == path


def test_both_paths_give_the_same_values_and_gradients() -> None:
    torch.manual_seed(0)
    layer = GroveLinear(12, 12, 10, left="private", right="private", core="dense").double()
    x = torch.randn(500, 12, dtype=torch.float64)
    assert layer.compute_path(500) == "composed" and layer.compute_path(2) == "factored"
    slope = torch.randn(500, 12, dtype=torch.float64)
    (layer(x) * slope).sum().backward()
    composed = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    for rows, part in zip(x.split(2), slope.split(2), strict=True):
        (layer(rows) * part).sum().backward()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(parameter.grad, composed[name])


@pytest.mark.parametrize("name", CASES)
def test_held_weights_give_the_same_and_gradients_pass_them_by(name: str) -> None:
    layer, x = grove(name), torch.randn(4, 13)
    layer.add_adaptor("legal")
    layer.adaptors["legal"].data.normal_()
    base = layer(x)
    with composed_weights(layer):
        with torch.no_grad():
            assert torch.allclose(layer(x), base, atol=1e-5)
            layer.set_adaptor("legal")
            assert torch.allclose(layer(x), x @ layer.merged_weight().T, atol=1e-5)
            layer.set_adaptor(None)
        layer(x).sum().backward()
    learned = [p for p in layer.multiplied_matrices() if p is not layer.adaptors["legal"]]
    assert learned and all(parameter.grad is not None for parameter in learned)
    with torch.no_grad():
        for parameter in learned:
            parameter.mul_(2)
        assert not torch.allclose(layer(x), base, atol=1e-3)


@pytest.mark.parametrize("word", ["core", "left", "right"])
def test_a_word_that_the_layer_does_not_know_is_refused(word: str) -> None:
    options = {"left": "private", "right": "identity", "core": "diagonal"} | {word: "diag"}
    with pytest.raises(ValueError, match=f"{word} must be .* or .*, got 'diag'"):
        GroveLinear(6, 8, 6, **options)  # type: ignore[arg-type]


def test_a_way_of_sharing_or_a_layer_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="sharing must be group, cycle, mix or band, got 'groups'"):
        GroveBank(8, 6, num_layers=2, group_size=2, sharing="groups", rank_axis=0)  # type: ignore[arg-type]
    bank = GroveBank(8, 6, num_layers=2, group_size=2, sharing="cycle", rank_axis=0)
    for layer in (-1, 2):
        with pytest.raises(IndexError, match=f"there is no layer {layer}: the bases are of 2 layers"):
            bank.of_layer(layer)
