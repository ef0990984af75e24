"""A timer for the silence of workers, which leaves out time in which this process was itself suspended."""

import time


class StallTimer:
    """Seconds since the last message. Each call of seconds() adds at most one second, so time in which this process was
    itself suspended or blocked is not counted: messages that came meanwhile are read afterwards."""

    AT_MOST = 1.0  # seconds that one call adds

    def __init__(self) -> None:
        self._seconds, self._last_call = 0.0, time.monotonic()

    def reset(self) -> None:
        """Starts at zero again: a message has come."""
        self._seconds, self._last_call = 0.0, time.monotonic()

    def seconds(self) -> float:
        """The seconds since the last message. It must be called at least about every second."""
        now = time.monotonic()
        self._seconds += min(now - self._last_call, self.AT_MOST)
        self._last_call = now
        return self._seconds
