"""Adaptors over a frozen model: exact when off, switched, mixed, merged, and a different one for each row."""

import pytest
import torch
from adapted_models import fill, grove, llama, logits_of
from torch import Tensor, nn

from kalmagrove.adaptors import Adaptors
from kalmagrove.errors import KalmaGroveError, UsageError
from kalmagrove.nn.grove import GroveLinear, composed_weights


@pytest.fixture
def adaptors(model: nn.Module) -> Adaptors:
    made = Adaptors(model)
    for seed, name in enumerate(("legal", "medical")):
        made.add_adaptor(name, 3 + seed)
        fill(made, name, seed)
    return made


def test_every_linear_layer_is_adapted_and_no_embedding(model: nn.Module) -> None:
    layers = Adaptors(model).layers
    assert len(layers) == sum(
        isinstance(module, nn.Linear | GroveLinear) or type(module).__name__ == "Conv1D" for module in model.modules()
    ) - ("lm_head" in dict(model.named_modules()))
    assert not any("embed" in name or "lm_head" in name or "wte" in name for name in layers)


def test_a_new_adaptor_changes_nothing_and_learns_from_the_first_step(model: nn.Module, tokens: Tensor) -> None:
    base = logits_of(model, tokens)
    adaptors = Adaptors(model)
    cores = adaptors.add_adaptor("legal", 4)
    adaptors.set_adaptor("legal")
    assert torch.equal(logits_of(model, tokens), base)
    model(input_ids=tokens).logits.square().sum().backward()
    assert all(core.grad is not None and bool(core.grad.abs().sum() > 0) for core in cores.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_base_is_bit_equal_whenever_the_adaptor_is_off(adaptors: Adaptors, tokens: Tensor) -> None:
    base = logits_of(adaptors.model, tokens)
    adaptors.set_adaptor("legal")
    assert not torch.allclose(logits_of(adaptors.model, tokens), base, atol=1e-3)
    with adaptors.disabled():
        assert torch.equal(logits_of(adaptors.model, tokens), base)
    assert adaptors.active == "legal"
    adaptors.set_adaptor(None)
    assert torch.equal(logits_of(adaptors.model, tokens), base)
    state = {name: tensor.clone() for name, tensor in adaptors.model.state_dict().items()}
    adaptors.detach()
    assert torch.equal(logits_of(adaptors.model, tokens), base)
    assert state.keys() == adaptors.model.state_dict().keys()


def test_the_change_of_a_layer_is_u_r_v(adaptors: Adaptors) -> None:
    """Against the definition, with the bases from torch's own decomposition."""
    name, layer = next(iter(adaptors.layers.items()))
    core = adaptors.cores("legal")[name].detach()
    weight = layer.merged_weight() if isinstance(layer, GroveLinear) else layer.weight.detach()
    weight = weight.T if type(layer).__name__ == "Conv1D" else weight
    left, _, right = torch.linalg.svd(weight)
    sign = left[:, :3].gather(0, left[:, :3].abs().argmax(dim=0, keepdim=True)).sign()
    expected = (left[:, :3] * sign) @ core @ (right[:3] * sign.T)
    assert torch.allclose(adaptors.change("legal", name).detach(), expected, atol=1e-5)


def test_switching_computes_and_copies_nothing(adaptors: Adaptors) -> None:
    adaptors.set_adaptor("medical")
    cores = {name: [core.data_ptr() for core in adaptors.cores(name).values()] for name in adaptors.names}
    with torch.profiler.profile(acc_events=True) as profile:
        adaptors.set_adaptor("legal")
    assert not profile.key_averages()
    assert cores == {name: [core.data_ptr() for core in adaptors.cores(name).values()] for name in adaptors.names}


def test_each_row_has_its_own_adaptor(adaptors: Adaptors, tokens: Tensor) -> None:
    alone = []
    for row, name in enumerate(("medical", None, "legal")):
        adaptors.set_adaptor(name)
        alone.append(logits_of(adaptors.model, tokens[row : row + 1]))
    adaptors.set_adaptor("legal")
    with adaptors.rows(["medical", None, "legal"]):
        together = logits_of(adaptors.model, tokens)
        with pytest.raises(KalmaGroveError, match=r"3 rows have an adaptor, and layer .* was given 2"):
            logits_of(adaptors.model, tokens[:2])
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(together[0], together[2], atol=1e-3)


def test_the_base_is_bit_equal_inside_rows_too(adaptors: Adaptors, tokens: Tensor) -> None:
    base = logits_of(adaptors.model, tokens)
    with adaptors.rows(["medical", None, "legal"]):
        before = logits_of(adaptors.model, tokens)
        with adaptors.disabled():
            assert torch.equal(logits_of(adaptors.model, tokens), base)
        assert torch.equal(logits_of(adaptors.model, tokens), before)


def test_rows_give_gradients_to_their_own_adaptors(adaptors: Adaptors, tokens: Tensor) -> None:
    with adaptors.rows(["medical", None, None]):
        adaptors.model(input_ids=tokens).logits.square().sum().backward()
    assert all(core.grad is not None for core in adaptors.cores("medical").values())
    assert all(core.grad is None for core in adaptors.cores("legal").values())


def test_merging_computes_the_same_and_unmerging_gives_the_bits_back(adaptors: Adaptors, tokens: Tensor) -> None:
    base = logits_of(adaptors.model, tokens)
    weights = {name: tensor.clone() for name, tensor in adaptors.model.state_dict().items()}
    adaptors.set_adaptor("medical")
    expected = logits_of(adaptors.model, tokens)
    adaptors.merge()
    assert torch.allclose(logits_of(adaptors.model, tokens), expected, atol=1e-5)
    assert not any(isinstance(module, GroveLinear) for module in adaptors.model.modules())
    for refused in (adaptors.merge, lambda: adaptors.set_adaptor("legal"), lambda: adaptors.remove_adaptor("legal")):
        with pytest.raises(UsageError, match="'medical' is merged into the weights; unmerge it first"):
            refused()
    adaptors.unmerge()
    assert torch.equal(logits_of(adaptors.model, tokens), expected)
    adaptors.set_adaptor(None)
    assert torch.equal(logits_of(adaptors.model, tokens), base)
    assert weights.keys() == adaptors.model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in adaptors.model.state_dict().items())


def test_a_weighted_sum_adds_up_the_changes_of_different_ranks(adaptors: Adaptors) -> None:
    adaptors.add_weighted_adaptor("mixed", {"legal": 0.25, "medical": -2.0})
    for layer in adaptors.layers:
        expected = 0.25 * adaptors.change("legal", layer) - 2.0 * adaptors.change("medical", layer)
        assert torch.allclose(adaptors.change("mixed", layer), expected, atol=1e-5)


def test_with_composed_weights_the_adaptor_still_counts(tokens: Tensor) -> None:
    adaptors = Adaptors(grove())
    adaptors.add_adaptor("legal", 4)
    fill(adaptors, "legal", 0)
    adaptors.set_adaptor("legal")
    expected = logits_of(adaptors.model, tokens)
    with composed_weights(adaptors.model):
        assert torch.allclose(logits_of(adaptors.model, tokens), expected, atol=1e-5)


def test_cached_decoding_is_the_whole_forward_with_an_adaptor(tokens: Tensor) -> None:
    adaptors = Adaptors(grove())
    adaptors.add_adaptor("legal", 4)
    fill(adaptors, "legal", 0)
    adaptors.set_adaptor("legal")
    cache = adaptors.model.new_cache()
    with torch.no_grad():
        parts = [adaptors.model(piece, cache=cache).logits for piece in tokens.split(5, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), logits_of(adaptors.model, tokens), atol=1e-4)


def test_a_model_in_half_precision_can_be_adapted(tokens: Tensor) -> None:
    adaptors = Adaptors(llama().to(torch.bfloat16))
    adaptors.add_adaptor("legal", 4)
    base = logits_of(adaptors.model, tokens)
    fill(adaptors, "legal", 0)
    adaptors.set_adaptor("legal")
    changed = logits_of(adaptors.model, tokens)
    assert changed.dtype == torch.bfloat16 and not torch.equal(changed, base)
    adaptors.merge()
    assert torch.allclose(logits_of(adaptors.model, tokens).float(), changed.float(), atol=0.05)


def test_wrong_names_and_ranks_are_refused(adaptors: Adaptors) -> None:
    for name in ("", "../up", "a/b", "a\\b", ".hidden", "x" * 65, "with space", "neu\u00e9"):
        with pytest.raises(UsageError, match="an adaptor's name has at most 64"):
            adaptors.add_adaptor(name, 2)
    with pytest.raises(UsageError, match="'legal' exists already"):
        adaptors.add_adaptor("legal", 2)
    with pytest.raises(UsageError, match="must be at least 1, got 0"):
        adaptors.add_adaptor("new", 0)
    with pytest.raises(UsageError, match="no adaptor 'tax'; there are: legal, medical"):
        adaptors.set_adaptor("tax")
    with pytest.raises(UsageError, match="no adaptor 'tax'"), adaptors.rows(["tax"]):
        pass
    with pytest.raises(UsageError, match="at least one adaptor"):
        adaptors.add_weighted_adaptor("sum", {})
    with pytest.raises(UsageError, match="no adaptor 'tax'"):
        adaptors.add_weighted_adaptor("sum", {"tax": 1.0})
    adaptors.set_adaptor(None)
    with pytest.raises(UsageError, match="no adaptor is on"):
        adaptors.merge()
    assert adaptors.names == ["legal", "medical"]


def test_an_adaptor_that_is_removed_is_off(adaptors: Adaptors, tokens: Tensor) -> None:
    base = logits_of(adaptors.model, tokens)
    adaptors.set_adaptor("legal")
    adaptors.remove_adaptor("legal")
    assert torch.equal(logits_of(adaptors.model, tokens), base)
    assert adaptors.names == ["medical"]


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(KalmaGroveError, match="no linear layers to adapt"):
        Adaptors(nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3)))
