"""Progress of a conversion: a bar on a terminal, elsewhere one line at the start."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kilobatch.data.sources.path_names import printable


@contextmanager
def progress_bar(total: int, out: Path, progress: bool) -> Iterator[Callable[[], object]]:
    """Yields a function to call after each image: a progress bar on a terminal, elsewhere one line at the start."""
    if not progress or not sys.stderr.isatty():
        if progress:
            print(f"converting {total:,} images to {printable(str(out))}", file=sys.stderr, flush=True)
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True, emoji=False)) as bar:
        task = bar.add_task(printable(out.name), total=total)
        yield lambda: bar.advance(task)
