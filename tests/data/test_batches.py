"""Training windows form seeded epochs; evaluation windows score each token once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalmagrove.data.batches import batch_at, evaluation_windows, tokens_needed, window_count
from kalmagrove.errors import KalmaGroveError, UsageError


def epoch_starts(length: int, context: int, seed: int, epoch: int) -> list[int]:
    windows = window_count(length, context)
    tokens = np.arange(length, dtype=np.uint16)
    sequences = [
        batch_at(tokens, context_length=context, batch_size=1, seed=seed, step=epoch * windows + place)[0]
        for place in range(windows)
    ]
    for sequence in sequences:
        assert sequence.tolist() == list(range(sequence[0], sequence[0] + context + 1))
    return [int(sequence[0]) for sequence in sequences]


@given(length=st.integers(2, 200), context=st.integers(1, 40), seed=st.integers(0, 9), epoch=st.integers(0, 5))
def test_an_epoch_reads_each_of_its_windows_once(length: int, context: int, seed: int, epoch: int) -> None:
    if length < tokens_needed(context):
        return
    starts = sorted(epoch_starts(length, context, seed, epoch))
    assert starts == list(range(starts[0], starts[0] + len(starts) * context, context))
    assert starts[0] >= 0 and starts[-1] + context < length
    unread = length - 1 - len(starts) * context
    assert unread < 2 * context


@given(length=st.integers(30, 60), context=st.integers(1, 9), step=st.integers(0, 30))
def test_batch_and_world_size_do_not_change_the_sequence(length: int, context: int, step: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 999, length)
    whole = batch_at(tokens, context_length=context, batch_size=6, seed=3, step=step)
    ranks = [
        batch_at(tokens, context_length=context, batch_size=6, seed=3, step=step, rows=rows)
        for rows in (range(2), range(2, 6))
    ]
    steps = [batch_at(tokens, context_length=context, batch_size=2, seed=3, step=3 * step + part) for part in range(3)]
    assert np.array_equal(whole, np.concatenate(ranks)) and np.array_equal(whole, np.concatenate(steps))
    assert whole.shape == (6, context + 1) and whole.dtype == np.int64


def test_epochs_differ_in_order_and_offset_and_reach_every_token() -> None:
    starts = [epoch_starts(47, 7, seed=1, epoch=epoch) for epoch in range(200)]
    assert {len(epoch) for epoch in starts} == {5}
    assert len({min(epoch) for epoch in starts}) == 47 - 5 * 7
    assert len({tuple(np.argsort(epoch)) for epoch in starts}) > 50
    assert epoch_starts(47, 7, seed=2, epoch=0) != starts[0]


def test_the_sequence_stays_the_same_between_versions() -> None:
    starts = [epoch_starts(47, 7, seed=5, epoch=epoch) for epoch in range(2)]
    assert starts == [[25, 18, 32, 11, 4], [1, 29, 22, 8, 15]]


def test_the_shortest_split_is_one_window_and_a_shorter_one_is_refused() -> None:
    assert batch_at(np.arange(6), context_length=5, batch_size=3, seed=0, step=7).tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    message = "the split holds 5 tokens, but a context length of 5 needs at least 6; use more text or a shorter context"
    with pytest.raises(KalmaGroveError, match=message):
        batch_at(np.arange(5), context_length=5, batch_size=1, seed=0, step=0)
    with pytest.raises(UsageError, match="context_length must be at least 1, got 0"):
        batch_at(np.arange(5), context_length=0, batch_size=1, seed=0, step=0)


@given(length=st.integers(2, 80), context=st.integers(1, 30), data=st.data())
def test_evaluation_scores_each_token_but_the_first_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    scored: list[int] = []
    for window, count in evaluation_windows(np.arange(length, dtype=np.uint16), context_length=context, stride=stride):
        assert window.dtype == np.int64 and 2 <= len(window) <= context + 1 and 1 <= count < len(window)
        if scored:
            assert count <= stride and len(window) - count > min(context - stride, length - 2)
        scored += window[-count:].tolist()
    assert scored == list(range(1, length))


def test_evaluation_with_a_full_stride_cuts_the_stream_into_plain_windows() -> None:
    windows = list(evaluation_windows(np.arange(8), context_length=3, stride=3))
    assert [(window.tolist(), count) for window, count in windows] == [
        ([0, 1, 2, 3], 3),
        ([3, 4, 5, 6], 3),
        ([6, 7], 1),
    ]


def test_evaluation_refuses_what_it_cannot_score() -> None:
    with pytest.raises(KalmaGroveError, match="holds 1 tokens, but at least 2 are needed"):
        next(evaluation_windows(np.arange(1), context_length=3, stride=3))
    for stride in (0, 4):
        with pytest.raises(UsageError, match=f"stride must be between 1 and the context length 3, got {stride}"):
            next(evaluation_windows(np.arange(9), context_length=3, stride=stride))
