"""Signals to the supervisor."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from ds_gpt2.run_dir.stop_request import SIGNALS
from ds_gpt2.supervision.stop_signals import StopSignals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the handlers of this process."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_further_signals_after_a_stop_request_are_ignored_to_the_end_of_the_process(number: signal.Signals) -> None:
    with StopSignals() as stop:
        signal.raise_signal(number)
        assert stop.requested
    assert signal.getsignal(number) is signal.SIG_IGN  # also during the shutdown of Python, unlike a handler
    signal.raise_signal(signal.SIGINT)


def test_without_a_stop_request_the_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as stop:
        assert not stop.requested
    assert [signal.getsignal(number) for number in SIGNALS] == before
