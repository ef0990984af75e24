"""What a job hears."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from kilobatch.launch.jobs.signals import Signals

HEARD = (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)


@pytest.fixture
def signals() -> Iterator[Signals]:
    before = {number: signal.getsignal(number) for number in HEARD}
    yield Signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_is_the_reason(signals: Signals):
    assert signals.asked() is None
    began = time.monotonic()
    for number in (signal.SIGCONT, signal.SIGUSR2, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert signals.asked() == "SIGUSR2"
    assert began <= signals.at <= time.monotonic()


def test_long_work_is_left_at_a_signal_and_not_begun_after_one(signals: Signals):
    done: list[str] = []

    def work() -> None:
        done.append("begun")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        done.append("ended")

    signals.unless_asked(work)
    os.kill(os.getpid(), signal.SIGTERM)  # outside of it, nothing is broken off
    signals.unless_asked(work)
    assert done == ["begun"]
