"""`kilobatch status`: prints runs as a table, once or every WATCH_SECONDS, or as JSON. Loads no torch."""

import json
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kilobatch.data.errors import UserError
from kilobatch.launch.pipelines.pipeline import find_pipeline
from kilobatch.launch.pipelines.results import print_results, read_results
from kilobatch.launch.runs.job_history import last_line
from kilobatch.launch.runs.overview import Overview, RunRow, overview

WATCH_SECONDS = 10.0  # between two tables; the scheduler is asked for each
STYLES = {"running": "green", "queued": "cyan", "failed": "bold red", "damaged": "bold red", "interrupted": "yellow"}
UNKNOWN = "–"
UNLIMITED_WIDTH = 1000  # characters, where there is no terminal


def status(runs: Sequence[str], sweep: str | None, *, everything: bool, watch: bool, as_json: bool) -> None:
    """Prints an overview of runs; see `overview` for which. Raises UserError for runs that do not exist."""
    if watch and as_json:
        raise UserError("--json prints once; leave --watch out, and ask again no sooner than every 10 s")
    if runs and sweep:
        raise UserError(f"--sweep {sweep} lists all its points; leave {runs[0]} out")
    found = overview(runs, sweep, everything)
    if as_json:
        print(json.dumps([json.loads(row.model_dump_json()) for row in found.rows], indent=1))  # null, not NaN
        return
    console = Console(emoji=False)
    if not console.is_terminal:
        console = Console(width=UNLIMITED_WIDTH, emoji=False)  # the reader is a pipe or a file, which needs whole lines
    if not watch:
        console.print(render(found, console))
        for top in filter(None, map(find_pipeline, runs)):
            if rows := read_results(top):
                print_results(rows)
        return
    with Live(render(found, console), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(WATCH_SECONDS)
                live.update(render(overview(runs, sweep, everything), console), refresh=True)
        except KeyboardInterrupt:  # the way to end --watch
            return


def render(found: Overview, console: Console) -> Group:
    """The table, without columns for which the console is too narrow, and below it what went wrong."""
    below = [Text(f"{row.run}: {problem}", style="red") for row in found.rows if (problem := _problem(row))]
    below += [Text(note, style="yellow") for note in found.notes]
    if found.older:
        below.append(Text(f"{found.older} more ended over a week ago (--all)", style="dim"))
    if not found.rows:
        return Group(Text("no runs here yet (kilobatch train, or submit)"), *below)
    return Group(_fitting_table(found.rows, console.width), *below)


def _fitting_table(rows: list[RunRow], width: int) -> Table:
    """The table without the columns for which there is no room. Nothing is cut off: a number without its last digits
    is another number. Where it is still too wide, names and states go on in a second line."""
    columns = [name for name in COLUMNS if any(COLUMNS[name](row) != UNKNOWN for row in rows)]
    # A table is never measured wider than the console that measures it, so another console does.
    measuring = Console(width=UNLIMITED_WIDTH, emoji=False)
    for dropped in ("", *DROPPED_WHEN_NARROW):
        columns = [column for column in columns if column != dropped]
        if measuring.measure(table := _table(columns, rows)).maximum <= width:
            return table
    for dropped in ("", *DROPPED_WHEN_VERY_NARROW):
        columns = [column for column in columns if column != dropped]
        others = _table([column for column in columns if column not in FOLDED_TO], rows)
        if measuring.measure(others).maximum + sum(FOLDED_TO.values()) + 2 * len(FOLDED_TO) <= width:
            break
    return _table(columns, rows, fold=True)


def _table(columns: list[str], rows: list[RunRow], *, fold: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        folds = fold and name in FOLDED_TO
        justify = "left" if name in LEFT_ALIGNED else "right"
        table.add_column(name, no_wrap=not folds, overflow="fold" if folds else "ellipsis", justify=justify)
    for row in rows:
        cells = [
            Text(COLUMNS[name](row), style=STYLES.get(row.state, "") if name == "state" else "") for name in columns
        ]
        table.add_row(*cells)
    return table


def _problem(row: RunRow) -> str:
    """The rank and host that failed first, why, and the last line it wrote; "" for a run without a problem."""
    if row.problem is None:
        return ""
    where = f"rank {row.rank} on {row.host}" if row.rank is not None else row.host or ""
    return ": ".join(filter(None, (where, row.problem, last_line(row.lines))))


def format_duration(seconds: float) -> str:
    """A number of seconds as text, such as 45s, 12m, 3h05m or 2d04h."""
    if seconds < 59.5:
        return f"{round(seconds)}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02}h" if days else f"{hours}h{minutes:02}m"


def _state(row: RunRow) -> str:
    return f"queued ({row.waiting})" if row.waiting else row.state


def _nodes(row: RunRow) -> str:
    size = UNKNOWN if row.workers is None else f"{row.nodes}×{row.workers // row.nodes}"
    return f"{size} {row.hosts}" if row.hosts else size


def _requeues(row: RunRow) -> str:
    counts = list(row.requeues.model_dump().values())
    return "/".join(map(str, counts)) if any(counts) else UNKNOWN


def _checkpoint(row: RunRow) -> str:
    if row.checkpoint_step is None:
        return UNKNOWN
    if row.checkpoint_age is None:  # by a clock that is ahead of this machine's
        return str(row.checkpoint_step)
    return f"{row.checkpoint_step}, {format_duration(row.checkpoint_age)} ago"


def _fraction(done: float | None, total: int | None, form: str) -> str:
    return UNKNOWN if done is None else f"{format(done, form)}/{total}"


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


COLUMNS: dict[str, Callable[[RunRow], str]] = {
    "run": lambda row: row.run,
    "state": _state,
    "job": lambda row: row.job or UNKNOWN,
    "nodes": _nodes,
    "epoch": lambda row: _fraction(row.epoch, row.epochs, ".1f"),
    "step": lambda row: _fraction(row.step, row.steps, "d"),
    "loss": lambda row: _number(row.loss, ".4f"),
    "k-NN": lambda row: _number(row.knn, ".1%"),
    "top-1": lambda row: _number(row.top1, ".1%"),
    "images/s": lambda row: _number(row.images_per_second, ",.0f"),
    "data wait": lambda row: _number(row.data_wait, ".0%"),
    "ETA": lambda row: UNKNOWN if row.eta is None else format_duration(row.eta),
    "requeues p/t/c/n": _requeues,  # preemptions, time-outs, crashes, node failures
    "checkpoint": _checkpoint,
}
LEFT_ALIGNED = ("run", "state", "job", "nodes")
# in this order
DROPPED_WHEN_NARROW = ("data wait", "epoch", "nodes", "images/s", "requeues p/t/c/n", "job", "checkpoint")
DROPPED_WHEN_VERY_NARROW = ("ETA", "k-NN", "top-1", "loss", "step")
FOLDED_TO = {"run": 12, "state": 11}  # characters of a line at least
