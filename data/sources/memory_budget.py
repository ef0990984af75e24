"""Bytes of decoded images that the threads of a conversion hold together."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

DEEP_BYTES = 16  # that a pixel of more than 8 bits takes at most while it is read: as numbers of 32 bits, and as bytes


class MemoryBudget:
    """Bytes of decoded images that threads may hold together. One image may take more, but then alone."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.changed = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Waits until there is room for `size` bytes, and holds it."""
        with self.changed:
            self.changed.wait_for(lambda: self.used == 0 or self.used + size <= self.limit)
            self.used += size
        try:
            yield
        finally:
            with self.changed:
                self.used -= size
                self.changed.notify_all()


BUDGET = MemoryBudget(1 << 30)
