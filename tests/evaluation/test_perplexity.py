"""Scores against hand-computed numbers, and windows that score every token once."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kalmagrove.evaluation.perplexity import score_tokens, scores_from_nats
from kalmagrove.models import scoring


class Bigram(nn.Module):
    """A model whose prediction depends on the last token alone, so that windows cannot change its scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 11, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def test_the_three_measures_are_what_they_are_called() -> None:
    scores = scores_from_nats(100.0, tokens=50, words=20, text_bytes=80)
    assert scores.loss == 2.0
    assert scores.perplexity == pytest.approx(math.exp(2))
    assert scores.word_perplexity == pytest.approx(math.exp(5))
    assert scores.bits_per_byte == pytest.approx(100 / math.log(2) / 80)


def test_a_hopeless_model_has_an_infinite_perplexity_and_no_error() -> None:
    assert scores_from_nats(1e6, tokens=10, words=3, text_bytes=10).word_perplexity == math.inf


@pytest.mark.parametrize("budget", [1, 400, 1 << 20])
@pytest.mark.parametrize("stride", [1, 3, 7])
@pytest.mark.parametrize("length", [2, 8, 30, 36])
def test_every_token_but_the_first_is_scored_once(
    length: int, stride: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "LOGIT_BUDGET", budget)
    tokens = np.random.default_rng(1).integers(0, 11, length)
    model = Bigram()
    scores = score_tokens(
        model, tokens, words=5, text_bytes=9, context_length=7, stride=stride, vocab_size=11,
        device=torch.device("cpu"), precision="fp32",
    )  # fmt: skip
    logs = model.table.log_softmax(dim=-1)
    expected = -sum(float(logs[a, b].detach()) for a, b in pairwise(tokens))
    assert scores.tokens == length - 1
    assert scores.loss == pytest.approx(expected / (length - 1), rel=1e-5)
    assert model.training
