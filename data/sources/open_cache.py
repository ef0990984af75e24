"""Sources that this process has opened lately: one whose files have not changed since is not read again.

A launcher counts images and classes, reads labels and converts: each would read a list of millions of lines.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
KEPT = 4  # sources; a recipe has two
SETTLED = 2_000_000_000  # ns: a file changed later than this before it was read may change again at the same time stamp


class _Opened(NamedTuple):
    source: Any
    state: tuple[tuple[int, ...], ...]


_opened: OrderedDict[tuple[object, ...], _Opened] = OrderedDict()


def opened_once(kind: type[T], files: Iterable[Path], make: Callable[[], T], *key: object) -> T:
    """What `make` returns, or what it has returned for the same kind, files and key while the files were as now. files:
    those that it reads; an absent one is for `make` to refuse."""
    files = list(files)
    name = (kind, *map(str, files), *key)
    before, latest = _state(files)
    kept = _opened.get(name)
    if kept is not None and kept.state == before:
        return kept.source
    _opened.pop(name, None)
    now = time.time_ns()
    source = make()
    if files and latest < now - SETTLED and before == _state(files)[0]:
        _opened[name] = _Opened(source, before)
        while len(_opened) > KEPT:
            _opened.popitem(last=False)
    return source


def _state(files: list[Path]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Identity, size and times of change of the files; and the latest of these times, in ns."""
    states: list[tuple[int, ...]] = []
    latest = 0
    for file in files:
        try:
            of = file.stat()
        except OSError:
            return (), time.time_ns()
        states.append((of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns))
        latest = max(latest, of.st_mtime_ns, of.st_ctime_ns)
    return tuple(states), latest
