"""How long nothing has been heard."""

import time


class Silence:
    """Counts the time in which we listened ourselves: that of a suspended job, or of a slow disk, does not count, since
    what was said meanwhile is heard afterwards."""

    AT_MOST = 1.0  # seconds from one look to the next that count

    def __init__(self) -> None:
        self._seconds, self._looked = 0.0, time.monotonic()

    def broken(self) -> None:
        self._seconds, self._looked = 0.0, time.monotonic()

    def seconds(self) -> float:
        """To be called about every second or more often."""
        now = time.monotonic()
        self._seconds += min(now - self._looked, self.AT_MOST)
        self._looked = now
        return self._seconds
