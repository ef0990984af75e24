"""Records the signals by which a scheduler asks a job to stop."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


class StopSignal(BaseException):
    """Raised by a signal handler, to end work that does not check for signals itself."""


class Signals:
    """Handlers that record the first SIGUSR2 or SIGTERM. They replace all others, those of submitit too.

    name: of the signal, None before one has come; received_at: its time, by time.monotonic().
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.received_at = 0.0
        self._interrupts = False
        signal.signal(signal.SIGUSR2, self._record)
        signal.signal(signal.SIGTERM, self._record)
        signal.signal(signal.SIGCONT, signal.SIG_IGN)  # SLURM sends it together with SIGTERM

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self.received_at = signal.Signals(number).name, time.monotonic()
        if self._interrupts:
            self._interrupts = False
            raise StopSignal

    def stop_requested(self) -> str | None:
        """The name of the first signal; None before one has come."""
        return self.name

    def run_unless_stopped(self, work: Callable[[], T]) -> T | None:
        """Calls `work`, but not after a signal. A signal that comes meanwhile ends it: StopSignal, which is caught.

        Returns what `work` does; None where it has not ended by itself.
        """
        assert threading.current_thread() is threading.main_thread(), "signal handlers run there"
        with suppress(StopSignal):
            try:
                self._interrupts = True
                if self.name is None:
                    return work()
            finally:
                self._interrupts = False
        return None
