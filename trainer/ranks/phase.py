"""The work of the moment and how far it is, said now and then for those who wait: by the one process that shows it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST, EVERY = 2.0, 10.0  # seconds after which a work that goes on is spoken of, and between two lines about it

_show: Callable[[str], None] | None = None
_every = EVERY
_name, _first, _done, _began, _due = "", 0, 0, 0.0, 0.0


def show_with(show: Callable[[str], None] | None, every: float = EVERY) -> None:
    """Has this process say with `show` what goes on, no more often than `every` seconds; None: it says nothing, as at
    first and on all ranks but one."""
    global _show, _every, _name
    _show, _every, _name = show, every, ""


@contextmanager
def shown_with(show: Callable[[str], None] | None, every: float = EVERY) -> Iterator[None]:
    """The same, until the end of a block."""
    show_with(show, every)
    try:
        yield
    finally:
        show_with(None)


def announce(name: str) -> None:
    """Says at once that a work begins, of which nothing may be heard for a while."""
    if _show is not None:
        _show(name)


def phase(name: str, done: int, total: int) -> None:
    """Notes that `done` of `total` parts of a work are done. Takes a microsecond.

    To be called wherever the work makes progress, and at its beginning, or where its speed is known from. What takes
    less than FIRST seconds stays unsaid.
    """
    global _name, _first, _done, _began, _due
    if _show is None:
        return
    now = time.monotonic()
    if name != _name or done < _done:  # another work, or the same anew
        _name, _first, _began, _due = name, done, now, now + FIRST
    elif now >= _due and done > _first:
        _due = now + _every
        left = (now - _began) / (done - _first) * (total - done)
        _show(f"{name}: {done:,} of {total:,}, {clock(left)} to go")
    _done = done


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
