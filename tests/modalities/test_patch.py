"""The density of patches: a probability over whole-numbered pixels, sound at its extremes, and draws from it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from kalmagrove.modalities import patch as patch_module
from kalmagrove.modalities.patch import PatchModality, bits_per_dimension
from kalmagrove.modalities.registry import make_modality

LEVELS = 4


def learnt(seed: int = 0, *, size: float = 0.7, **options: int) -> PatchModality:
    """A patch of two pixels with random parameters, as after a training."""
    terms = {"patch_size": 1, "channels": 2, "levels": LEVELS, "rows": 1, "columns": 1} | options
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        modality = PatchModality(6, 3, **terms)
        for parameter in modality.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)
    return modality


def alone(levels: Tensor) -> Tensor:
    """Features of patches that no other one follows in their image."""
    return torch.nn.functional.pad(levels, (0, 2), value=1.0)


def every_patch(pixels: int, levels: int = LEVELS) -> Tensor:
    return torch.tensor(list(itertools.product(range(levels), repeat=pixels)), dtype=torch.float32)


def hidden_states(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("size", [0.0, 0.7, 3.0])
@pytest.mark.parametrize(("options", "pixels"), [({}, 2), ({"patch_size": 2, "channels": 1}, 4)])
def test_all_patches_together_have_probability_one(size: float, options: dict[str, int], pixels: int) -> None:
    modality, patches = learnt(size=size, **options), every_patch(pixels)
    for hidden in hidden_states(5):
        chances = (-modality.nats(hidden.expand(len(patches), -1), patches).double()).exp()
        assert float(chances.sum()) == pytest.approx(1, abs=2e-5)
        assert torch.isfinite(chances).all()


def one_pixel_after_the_other(modality: PatchModality, hidden: Tensor, levels: Tensor) -> float:
    """The same density, written from its definition."""
    units, pixels, most = modality.inner_size, modality.pixels, modality.levels - 1
    begun = modality.head(hidden)
    state, values, total = begun[:units], levels * 2 / most - 1, 0.0
    for place in range(pixels):
        mean = begun[units + place] + modality.before[0, place, :place] @ values[:place]
        active = torch.nn.functional.silu(state + modality.state_bias[place, 0])
        mixed = active @ modality.mixture[place] + modality.mixture_bias[place, 0]
        weights, shifts, relative = mixed.unflatten(0, (3, -1))
        log_scale = begun[units + pixels + place]
        centres = mean + torch.exp(-2.5 + 5.5 * torch.tanh(log_scale / 5.5)) * shifts
        scales = torch.exp(-2.5 + 5.5 * torch.tanh((log_scale + relative) / 5.5))
        upper = torch.sigmoid((values[place] + 1 / most - centres) / scales)
        lower = torch.sigmoid((values[place] - 1 / most - centres) / scales)
        upper, lower = (upper if levels[place] < most else 1), (lower if levels[place] > 0 else 0)
        total -= float(torch.log((weights.softmax(0) * (upper - lower)).sum()))
        error = torch.asinh((values[place] - mean) * most / 2)
        state = state + error * modality.errors[place, 0]
    return total


@torch.no_grad()
def test_the_density_is_that_of_its_definition() -> None:
    modality = learnt(patch_size=2, channels=1, size=0.4).double()
    modality.head.double()
    hidden = hidden_states(8)
    levels = torch.randint(0, LEVELS, (8, 4), generator=torch.Generator().manual_seed(2))
    found = modality.nats(hidden, levels)
    wanted = [one_pixel_after_the_other(modality, h.double(), x.double()) for h, x in zip(hidden, levels, strict=True)]
    torch.testing.assert_close(found.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("autocast", [False, True])
def test_extreme_hidden_states_have_finite_nats_and_gradients(scale: float, autocast: bool) -> None:
    modality = learnt(levels=256, patch_size=2, channels=3)
    hidden = (hidden_states(64) * scale).requires_grad_()
    levels = torch.tensor([0.0, 255.0]).repeat(32)[:, None].expand(64, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        nats = modality.nats(hidden, levels)
    nats.sum().backward()
    assert nats.dtype == torch.float32 and torch.isfinite(nats).all()
    for tensor in (hidden, *modality.parameters()):
        assert tensor.grad is None or torch.isfinite(tensor.grad).all()
    assert modality.head.weight.grad is not None and modality.mixture.grad is not None


def test_autocast_does_not_make_pixels_coarse() -> None:
    modality, hidden = learnt(levels=256, patch_size=2, channels=1), hidden_states(9)
    levels = torch.randint(0, 256, (9, 4), generator=torch.Generator().manual_seed(0)).float()
    wanted = modality.nats(hidden, levels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(modality.nats(hidden, levels), wanted)
        assert torch.isfinite(modality.encode(alone(levels))).all()


def test_slices_and_running_sums_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    modality, hidden = learnt(levels=16, patch_size=3, channels=1, size=0.2), hidden_states(7)
    levels = torch.randint(0, 16, (7, 9), generator=torch.Generator().manual_seed(0)).float()
    wanted = modality.nats(hidden, levels)
    monkeypatch.setattr(patch_module, "_NUMBERS_AT_ONCE", 1)
    torch.testing.assert_close(modality.nats(hidden, levels), wanted)
    monkeypatch.setattr(patch_module, "_FEW_PIXELS", 0)
    torch.testing.assert_close(modality.nats(hidden, levels), wanted)


@pytest.mark.parametrize("size", [0.3, 1.0])
def test_draws_have_the_frequencies_that_nats_say(size: float) -> None:
    modality, count, patches = learnt(size=size), 40_000, every_patch(2)
    hidden = hidden_states(1, seed=4)
    generator = torch.Generator().manual_seed(0)
    drawn = modality.sample(hidden.expand(count, -1), generator)
    assert drawn.shape == (count, 2)
    found = torch.bincount((drawn[:, 0] * LEVELS + drawn[:, 1]).long(), minlength=len(patches))
    with torch.no_grad():
        expected = (-modality.nats(hidden.expand(len(patches), -1), patches)).exp() * count
    # Chi-squared with at most 15 degrees of freedom is above 45 once in ten thousand times.
    often = expected > 5
    assert float(((found - expected)[often] ** 2 / expected[often]).sum()) < 45
    assert abs(float((found - expected)[~often].sum())) < 30


def test_a_low_temperature_draws_likelier_patches() -> None:
    modality, hidden = learnt(size=0.3), hidden_states(1).expand(2000, -1)

    def mean_nats(temperature: float) -> float:
        drawn = modality.sample(hidden, torch.Generator().manual_seed(0), temperature)
        return float(modality.nats(hidden, drawn).detach().mean())

    assert mean_nats(0.5) < mean_nats(1.0)
    means = modality.sample(hidden, torch.Generator().manual_seed(0), 0)
    assert (means == means[0]).all()


def test_draws_depend_on_the_generator_alone() -> None:
    modality, hidden = learnt(), hidden_states(5)
    first, again, other = (modality.sample(hidden, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first, first.round()) and first.min() >= 0 and first.max() < LEVELS


def test_a_patch_is_read_with_where_the_next_one_lies() -> None:
    modality = make_modality("patch", 6, {
        "placeholder": 3, "patch_size": 1, "channels": 2, "levels": LEVELS, "rows": 2, "columns": 3,
    })  # fmt: skip
    assert isinstance(modality, PatchModality) and modality.feature_size == 4
    here, below, none = torch.tensor([[1.0, 2, 0, 1], [1, 2, 1, 1], [1, 2, 2, 3]])
    encoded = modality.encode(torch.stack((here, below, none)))
    assert encoded.shape == (3, 6) and len(encoded.unique(dim=0)) == 3
    # It is read, and not predicted.
    nats = modality.nats(hidden_states(1).expand(2, -1), torch.stack((here, below)))
    torch.testing.assert_close(nats[0], nats[1])


def test_contrast_is_read_beside_brightness() -> None:
    modality = learnt(levels=256, patch_size=2, channels=1)
    flat, faint = torch.full((1, 4), 100.0), torch.tensor([[100.0, 101, 100, 101]])
    encoded = modality.encode(alone(torch.cat((flat, faint, flat + 0.5))))
    moved, brighter = (encoded[1:] - encoded[0]).norm(dim=1)
    assert moved > 5 * brighter


@pytest.mark.parametrize("wrong", [{"levels": 1}, {"patch_size": 0}, {"channels": 0}, {"rows": 0}, {"columns": 0}])
def test_options_that_cannot_be_are_named(wrong: dict[str, int]) -> None:
    options = {"placeholder": 3, "patch_size": 2, "channels": 1, "levels": 4, "rows": 1, "columns": 1}
    with pytest.raises(ValueError, match="at least 2 levels and at least 1 of patch_size"):
        make_modality("patch", 6, options | wrong)
    with pytest.raises(ValueError, match=r"modality patch: .*unexpected keyword argument 'tiles'"):
        make_modality("patch", 6, options | {"tiles": 2})


def test_bits_per_dimension_of_even_chances() -> None:
    assert bits_per_dimension(12 * torch.log(torch.tensor(16.0)).item(), 12) == pytest.approx(4)
