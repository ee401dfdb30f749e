"""A signal asks a run to stop; the same again, a moment later, is whoever's it was before."""

import signal
from types import FrameType

import pytest

from kalmagrove.training import signals
from kalmagrove.training.signals import STOP_SIGNALS, StopRequest


def test_the_first_signal_is_remembered_and_one_that_comes_later_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    now = 100.0

    def remember(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    before = signal.signal(signal.SIGTERM, remember)
    try:
        with StopRequest() as stop:
            assert stop.number is None
            signal.raise_signal(signal.SIGTERM)
            # A shell and a launcher may both pass one on.
            now += 0.5
            signal.raise_signal(signal.SIGTERM)
            assert (stop.number, heard) == (signal.SIGTERM, [])
            now += 1.0
            signal.raise_signal(signal.SIGTERM)
            assert heard == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is remember
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_request_that_outlives_its_context_still_holds_the_first_signal_back() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with StopRequest() as stop:
            stop.outlive()
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
