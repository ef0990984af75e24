"""Signals that ask a job to stop."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from kilobatch.launch.jobs.signals import Signals

HANDLED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)


@pytest.fixture
def signals() -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield Signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_is_the_reason(signals: Signals):
    assert signals.stop_requested() is None
    began = time.monotonic()
    for number in (signal.SIGCONT, signal.SIGUSR2, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert signals.stop_requested() == "SIGUSR2"
    assert began <= signals.received_at <= time.monotonic()


def test_long_work_ends_at_a_signal_and_does_not_begin_after_one(signals: Signals):
    done: list[str] = []

    def work() -> None:
        done.append("begun")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        done.append("ended")

    assert signals.run_unless_stopped(lambda: "result") == "result"
    assert signals.run_unless_stopped(work) is None
    os.kill(os.getpid(), signal.SIGTERM)  # nothing is interrupted between the two calls
    assert signals.run_unless_stopped(work) is None
    assert done == ["begun"]
