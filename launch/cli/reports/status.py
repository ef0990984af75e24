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
from kilobatch.launch.runs.overview import Overview, overview
from kilobatch.launch.runs.run_row import RunRow
from kilobatch.trainer.monitor.progress_bar import in_digits

WATCH_SECONDS = 10.0  # between two tables; the scheduler is asked for each
STYLES = {"running": "green", "queued": "cyan", "failed": "bold red", "damaged": "bold red", "interrupted": "yellow"}
UNKNOWN = "–"
UNLIMITED_WIDTH = 1000  # characters, where there is no terminal


def status(runs: Sequence[str], *, best_first: bool, everything: bool, watch: bool, as_json: bool) -> None:
    """Prints an overview of runs; see `overview` for which. Raises UserError for runs that do not exist."""
    if watch and as_json:
        raise UserError("--json prints once; leave --watch out, and ask again no sooner than every 10 s")
    found = overview(runs, best_first=best_first, everything=everything)
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
    try:
        _watch(found, lambda: overview(runs, best_first=best_first, everything=everything), console)
    except KeyboardInterrupt:  # the way to end --watch
        return


def _watch(found: Overview, ask: Callable[[], Overview], console: Console) -> None:
    """Shows the overview, and a new one every WATCH_SECONDS: in its place on a terminal, elsewhere one below the other,
    each after the time of its writing."""
    if console.is_terminal:
        with Live(render(found, console), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(WATCH_SECONDS)
                live.update(render(ask(), console), refresh=True)
    while True:
        console.print(time.strftime("%Y-%m-%d %H:%M:%S"), render(found, console), sep="\n")
        console.file.flush()
        time.sleep(WATCH_SECONDS)
        found = ask()


def render(found: Overview, console: Console) -> Group:
    """The table, without columns for which the console is too narrow, and below it what k-NN figures are of, and what
    went wrong."""
    below = [Text(f"{row.run}: {problem}", style="red") for row in found.rows if (problem := _problem(row))]
    below += [
        Text(f"{row.run}: {note}", style="yellow" if note.warns else "") for row in found.rows for note in row.notes
    ]
    below += [Text(note, style="yellow") for note in found.notes]
    if found.older:
        below.append(Text(f"{found.older} more ended over a week ago (--all)", style="dim"))
    if not found.rows:
        return Group(Text("no runs here yet (kilobatch train, or submit)"), *below)
    table, columns = _fitting_table(found.rows, console.width)
    return Group(table, *map(Text, _comparisons(found.rows, whole="untrained" not in columns)), *below)


def _comparisons(rows: list[RunRow], *, whole: bool) -> list[str]:
    """Lines that say by which neighbours and images the k-NN of runs is, one for runs of which it is the same. whole:
    the figures, too, since the table has no room for them; so it is for a run whose baselines are of a sample."""
    runs: dict[str, list[str]] = {}
    for row in rows:
        if (found := row.baselines) is not None:
            figures = f": {found.shares(row.knn_sample if found.sampled else row.knn)}"
            line = f"k-NN ({found.conditions()}){figures if whole or found.sampled else ''}"
            runs.setdefault(line, []).append(row.run)
    return [f"{_listed(names)}: {line}" for line, names in runs.items()]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fitting_table(rows: list[RunRow], width: int) -> tuple[Table, list[str]]:
    """The table without the columns for which there is no room, and the others' names. Nothing is cut off: a number
    without its last digits is another number. Where it is still too wide, names and states go on in a second line."""
    columns = [name for name in COLUMNS if any(COLUMNS[name](row) != UNKNOWN for row in rows)]
    # A table is never measured wider than the console that measures it, so another console does.
    measuring = Console(width=UNLIMITED_WIDTH, emoji=False)
    for dropped in ((), *DROPPED_WHEN_NARROW):
        columns = [column for column in columns if column not in dropped]
        if measuring.measure(table := _table(columns, rows)).maximum <= width:
            return table, columns
    for dropped in ("", *DROPPED_WHEN_VERY_NARROW):
        columns = [column for column in columns if column != dropped]
        others = _table([column for column in columns if column not in FOLDED_TO], rows)
        if measuring.measure(others).maximum + sum(FOLDED_TO.values()) + 2 * len(FOLDED_TO) <= width:
            break
    return _table(columns, rows, fold=True), columns


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


def _baseline(row: RunRow, name: str) -> str:
    """A baseline of the same images as the run's k-NN; those of a sample stand below the table."""
    return UNKNOWN if row.baselines is None or row.baselines.sampled else _number(getattr(row.baselines, name), ".1%")


COLUMNS: dict[str, Callable[[RunRow], str]] = {
    "run": lambda row: row.run,
    "state": _state,
    "job": lambda row: row.job or UNKNOWN,
    "nodes": _nodes,
    "epoch": lambda row: _fraction(row.epoch, row.epochs, ".1f"),
    "step": lambda row: _fraction(row.step, row.steps, "d"),
    "loss": lambda row: UNKNOWN if row.loss is None else in_digits(row.loss),
    "k-NN": lambda row: _number(row.knn, ".1%"),
    "top-1": lambda row: _number(row.top1, ".1%"),
    "pixels": lambda row: _baseline(row, "pixels"),
    "untrained": lambda row: _baseline(row, "untrained"),
    "chance": lambda row: _baseline(row, "chance"),
    "images/s": lambda row: _number(row.images_per_second, ",.0f"),
    "data wait": lambda row: _number(row.data_wait, ".0%"),
    "ETA": lambda row: UNKNOWN if row.eta is None else format_duration(row.eta),
    "requeues p/t/c/n": _requeues,  # preemptions, time-outs, crashes, node failures
    "checkpoint": _checkpoint,
}
LEFT_ALIGNED = ("run", "state", "job", "nodes")
# in this order
BASELINES = ("pixels", "untrained", "chance")
DROPPED_WHEN_NARROW = (("data wait",), ("epoch",), ("nodes",), ("images/s",), ("requeues p/t/c/n",), ("job",))
DROPPED_WHEN_NARROW += (BASELINES, ("checkpoint",))
DROPPED_WHEN_VERY_NARROW = ("ETA", "k-NN", "top-1", "loss", "step")
FOLDED_TO = {"run": 12, "state": 11}  # characters of a line at least
