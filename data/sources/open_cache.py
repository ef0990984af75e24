"""Sources and folders that this process has read lately: what has not changed since is not read again.

A launcher counts images and classes, reads labels and converts: each would read a list of millions of lines.
"""

import math
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
KEPT = 4  # of each cache; a recipe has two sources
SETTLED = 2_000_000_000  # ns: a file changed later than this before it was read may change again at the same time stamp


class _Kept(NamedTuple):
    value: Any
    state: object
    started: float


class RecentlyRead:
    """The last few things that were read, each as long as what it was read from is as it was."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()

    def get(
        self,
        key: Hashable,
        read: Callable[[], T],
        state: Callable[[T], tuple[object, int]],
        settled: int = SETTLED,
        longest: float = math.inf,
    ) -> T:
        """What `read` returns, or has returned for this key.

        state: of what a value was read from: what tells it from a changed one, and the latest time of change in ns.
        settled: only what had changed longer ago than this, in ns, when it was read, is kept; longest: for how many
        seconds.
        """
        kept = self._kept.get(key)
        if kept is not None:
            if time.monotonic() - kept.started < longest and state(kept.value)[0] == kept.state:
                return kept.value
            del self._kept[key]
        started, now = time.monotonic(), time.time_ns()
        value = read()
        current, changed = state(value)
        if changed < now - settled:
            self._kept[key] = _Kept(value, current, started)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return value


_sources = RecentlyRead()


def opened_once(kind: type[T], files: Iterable[Path], make: Callable[[], T], *key: object) -> T:
    """What `make` returns, or what it has returned for the same kind, files and key while the files were as now. files:
    those that it reads; an absent one is for `make` to refuse."""
    files = list(files)
    return _sources.get((kind, *map(str, files), *key), make, lambda source: _state(files))


def _state(files: list[Path]) -> tuple[object, int]:
    """Identity, size and times of change of the files; and the latest of these times, in ns: a later one than any where
    a file is absent or there is none, so that nothing is kept."""
    states: list[tuple[int, ...]] = []
    latest = 0 if files else sys.maxsize
    for file in files:
        try:
            of = file.stat()
        except OSError:
            return (), sys.maxsize
        states.append((of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns))
        latest = max(latest, of.st_mtime_ns, of.st_ctime_ns)
    return states, latest
