"""The signals by which a scheduler says that a job's time is up."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType


class Stop(BaseException):
    """Breaks off what does not look at signals by itself."""


class Signals:
    """SIGUSR2 and SIGTERM are noted from now on, the first of them with its time, by time.monotonic(). Replaces any
    handlers, submitit's own too."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.at = 0.0
        self._breaks = False
        signal.signal(signal.SIGUSR2, self._note)
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGCONT, signal.SIG_IGN)  # comes along with SIGTERM

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self.at = signal.Signals(number).name, time.monotonic()
        if self._breaks:
            self._breaks = False
            raise Stop

    def asked(self) -> str | None:
        """The first signal's name."""
        return self.name

    def unless_asked(self, work: Callable[[], None]) -> None:
        """Does the work; leaves it at a signal, and does not begin it after one."""
        assert threading.current_thread() is threading.main_thread(), "handlers run there"
        with suppress(Stop):
            try:
                self._breaks = True
                if self.name is None:
                    work()
            finally:
                self._breaks = False
