"""Progress over images: a bar on a terminal, elsewhere a line at the start and one now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kilobatch.data.sources.path_names import printable

EVERY = 10.0  # seconds between two lines where there is no terminal


@contextmanager
def progress_bar(
    total: int, out: Path, progress: bool, doing: str = "converting", done: int = 0
) -> Iterator[Callable[[int], object]]:
    """Yields a function to call with each number of further images: a progress bar on a terminal, elsewhere lines.

    done: the images that an earlier start has finished.
    """
    if not progress:
        yield lambda more: None
        return
    if not sys.stderr.isatty():
        yield _Lines(total, out, doing, done).advance
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f} images/s")

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), Rate())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True, emoji=False)) as bar:
        task = bar.add_task(printable(out.name), total=total, completed=done)
        yield lambda more: bar.advance(task, more)


class _Lines:
    """A line at the start, and one every EVERY seconds. The time to go is by the rate after the first images, whose own
    time may hold a loop's compiling."""

    def __init__(self, total: int, out: Path, doing: str, done: int) -> None:
        before = f", of which {done:,} are done already" if done else ""
        print(f"{doing} {total:,} images to {printable(str(out))}{before}", file=sys.stderr, flush=True)
        self._total, self._name, self._done = total, printable(out.name), done
        self._printed = time.monotonic()
        self._from: tuple[float, int] | None = None  # the time and the images done by then

    def advance(self, more: int) -> None:
        self._done += more
        now = time.monotonic()
        began, first = self._from = self._from or (now, self._done)
        if now - self._printed < EVERY:
            return
        self._printed, to_go = now, ""
        if self._done > first:
            rate = (self._done - first) / (now - began)
            left = (self._total - self._done) / rate
            to_go = f", {left / 60:.0f} min to go" if left >= 90 else f", {left:.0f} s to go"
            to_go = f", {rate:{',.0f' if rate >= 10 else '.2g'}} images/s{to_go}"
        print(f"{self._name}: {self._done:,} of {self._total:,} images{to_go}", file=sys.stderr, flush=True)
