"""Numbers: their embedding is piecewise linear, and their heads give proper distributions over the bins."""

import pytest
import torch

from kalmagrove.modalities import number as number_module
from kalmagrove.modalities.number import BIN, COLUMN, KNOTS, PLACE, SCALED, NumberModality

BINS = [40, 2, 1, 9]


@pytest.fixture
def modality() -> NumberModality:
    generator = torch.Generator().manual_seed(0)
    modality = NumberModality(12, 5, bins=BINS)
    for parameter in modality.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return modality


def features(column: int, place: float, scaled: float = 0.0, own: int = 0) -> torch.Tensor:
    row = torch.zeros(1, 4)
    row[0, COLUMN], row[0, PLACE], row[0, SCALED], row[0, BIN] = column, place, scaled, own
    return row


def test_probabilities_of_every_column_sum_to_one_and_none_lies_beyond_its_bins(modality: NumberModality) -> None:
    hidden = 3 * torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    for column, bins in enumerate(BINS):
        chances = modality.log_probabilities(hidden, torch.full((50,), column)).exp()
        assert chances.shape == (50, 40) and (chances[:, bins:] == 0).all()
        torch.testing.assert_close(chances.sum(dim=1), torch.ones(50))


def test_nats_are_those_of_the_bin_in_training_and_in_evaluation(modality: NumberModality) -> None:
    hidden = torch.randn(4, 12, generator=torch.Generator().manual_seed(2))
    rows = torch.cat([features(column, 0.5, own=bins - 1) for column, bins in enumerate(BINS)])
    expected = [-modality.log_probabilities(hidden, rows[:, COLUMN].long())[row, BINS[row] - 1] for row in range(4)]
    for training in (True, False):
        torch.testing.assert_close(modality.train(training).nats(hidden, rows), torch.stack(expected))


def test_the_embedding_is_linear_between_knots_and_no_further(modality: NumberModality) -> None:
    step = 1 / (KNOTS - 1)

    def at(place: float) -> torch.Tensor:
        return modality.encode(features(0, place))

    torch.testing.assert_close(at(3.25 * step), 0.75 * at(3 * step) + 0.25 * at(4 * step))
    assert not torch.allclose(at(3.5 * step), 0.5 * at(2 * step) + 0.5 * at(5 * step), atol=1e-3)
    torch.testing.assert_close(at(-1.0), at(0.0))
    torch.testing.assert_close(at(2.0), at(1.0))


def test_a_size_beyond_all_places_is_still_read(modality: NumberModality) -> None:
    outside = [modality.encode(features(0, 1.0, scaled=scaled)) for scaled in (10.0, 1000.0, 1e6)]
    assert not torch.allclose(outside[0], outside[1], atol=1e-2) and not torch.allclose(
        outside[1], outside[2], atol=1e-2
    )
    assert all(torch.isfinite(own).all() for own in outside)


def test_columns_read_and_predict_the_same_value_differently(modality: NumberModality) -> None:
    assert not torch.allclose(modality.encode(features(0, 0.5)), modality.encode(features(3, 0.5)), atol=1e-2)
    hidden = torch.zeros(1, 12)
    first, other = (modality.log_probabilities(hidden, torch.tensor([column]))[:, :2] for column in (0, 3))
    assert not torch.allclose(first, other, atol=1e-2)


def test_gradients_are_finite_in_bfloat16(modality: NumberModality) -> None:
    hidden = torch.randn(8, 12, generator=torch.Generator().manual_seed(3)).mul(30).requires_grad_()
    rows = torch.cat([features(column % 4, column / 7, scaled=10.0**column) for column in range(8)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = modality.nats(hidden, rows).sum() + modality.encode(rows).float().square().sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in modality.parameters() if p.grad is not None)
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("bins", [[], [3, 0]])
def test_columns_without_bins_are_refused(bins: list[int]) -> None:
    with pytest.raises(ValueError, match="numbers need columns of at least one bin"):
        NumberModality(12, 5, bins=bins)


def test_logits_of_many_bins_are_linear_between_knots_and_few_bins_have_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(number_module, "KNOTS", 3)
    modality = NumberModality(2, 0, bins=[9, 3])
    with torch.no_grad():
        modality.head.weight.zero_()
        modality.column_bias.weight.zero_()
        modality.head.bias.copy_(torch.tensor([0.0, 4.0, -4.0]))
    many, few = modality.log_probabilities(torch.zeros(2, 2), torch.tensor([0, 1]))
    torch.testing.assert_close(many - many[0], torch.tensor([0.0, 1, 2, 3, 4, 2, 0, -2, -4]))
    torch.testing.assert_close((few - few[0])[:3], torch.tensor([0.0, 4, -4]))
