"""`kilobatch status`: runs as a table, now or every WATCH seconds, or as JSON. Loads no torch."""

import json
import time
from collections.abc import Callable, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kilobatch.data.errors import Refusal
from kilobatch.launch.pipelines import pipeline
from kilobatch.launch.pipelines import results as pipeline_table
from kilobatch.launch.runs.overview import Overview, Row, overview

WATCH = 10.0  # seconds; the scheduler is asked at each
STYLES = {"running": "green", "queued": "cyan", "failed": "bold red", "damaged": "bold red", "interrupted": "yellow"}
UNKNOWN = "–"
WIDE = 1000  # columns, where there is no terminal


def status(given: Sequence[str], sweep: str | None, *, everything: bool, watch: bool, as_json: bool) -> None:
    """Prints an overview. Raises Refusal for runs that are not there."""
    if watch and as_json:
        raise Refusal("--json prints once; leave --watch out, and ask again no sooner than every 10 s")
    if given and sweep:
        raise Refusal(f"--sweep {sweep} lists all its points; leave {given[0]} out")
    found = overview(given, sweep, everything)
    if as_json:
        print(json.dumps([row.model_dump(mode="json") for row in found.rows], indent=1))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)  # a pipe: nothing is cut off
    if not watch:
        console.print(draw(found, console))
        for top in filter(None, map(pipeline.find, given)):
            if rows := pipeline_table.read(top):
                pipeline_table.show(rows)
        return
    with Live(draw(found, console), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(WATCH)
                live.update(draw(overview(given, sweep, everything), console), refresh=True)
        except KeyboardInterrupt:  # how one leaves
            return


def draw(found: Overview, console: Console) -> Group:
    """The table, as wide as the console allows, and below it what went wrong."""
    below = [Text(f"{row.run}: {trouble}", style="red") for row in found.rows if (trouble := _trouble(row))]
    below += [Text(note, style="yellow") for note in found.notes]
    if found.older:
        below.append(Text(f"{found.older} more ended over a week ago (--all)", style="dim"))
    if not found.rows:
        return Group(Text("no runs here yet (kilobatch train, or submit)"), *below)
    columns = [name for name in COLUMNS if any(COLUMNS[name](row) != UNKNOWN for row in found.rows)]
    table, wide = _table(columns, found.rows), Console(width=WIDE)  # measured there: its own width is a limit to that
    for name in SPARED:
        if wide.measure(table).maximum <= console.width:
            break
        columns = [column for column in columns if column != name]
        table = _table(columns, found.rows)
    return Group(table, *below)


def _table(columns: list[str], rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=True, justify="left" if name in LEFT else "right")
    for row in rows:
        cells = [
            Text(COLUMNS[name](row), style=STYLES.get(row.state, "") if name == "state" else "") for name in columns
        ]
        table.add_row(*cells)
    return table


def _trouble(row: Row) -> str:
    if row.problem is None:
        return ""
    where = f"rank {row.rank} on {row.host}" if row.rank is not None else row.host or ""
    said = next((line.strip() for line in reversed(row.lines) if line.strip()), "")
    return ": ".join(filter(None, (where, row.problem, said)))


def span(seconds: float) -> str:
    """45s, 12m, 3h05m or 2d04h."""
    if seconds < 59.5:
        return f"{round(seconds)}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02}h" if days else f"{hours}h{minutes:02}m"


def _state(row: Row) -> str:
    return f"queued ({row.waiting})" if row.waiting else row.state


def _nodes(row: Row) -> str:
    size = UNKNOWN if row.workers is None else f"{row.nodes}×{row.workers // row.nodes}"
    return f"{size} {row.hosts}" if row.hosts else size


def _requeues(row: Row) -> str:
    counted = list(row.requeues.model_dump().values())
    return "/".join(map(str, counted)) if any(counted) else UNKNOWN


def _checkpoint(row: Row) -> str:
    if row.checkpoint_step is None or row.checkpoint_age is None:
        return UNKNOWN
    return f"{row.checkpoint_step}, {span(row.checkpoint_age)} ago"


def _of(done: float | None, whole: int | None, form: str) -> str:
    return UNKNOWN if done is None else f"{format(done, form)}/{whole}"


def _number(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


COLUMNS: dict[str, Callable[[Row], str]] = {
    "run": lambda row: row.run,
    "state": _state,
    "job": lambda row: row.job or UNKNOWN,
    "nodes": _nodes,
    "epoch": lambda row: _of(row.epoch, row.epochs, ".1f"),
    "step": lambda row: _of(row.step, row.steps, "d"),
    "loss": lambda row: _number(row.loss, ".4f"),
    "k-NN": lambda row: _number(row.knn, ".1%"),
    "top-1": lambda row: _number(row.top1, ".1%"),
    "images/s": lambda row: _number(row.images_per_second, ",.0f"),
    "data wait": lambda row: _number(row.data_wait, ".0%"),
    "ETA": lambda row: UNKNOWN if row.eta is None else span(row.eta),
    "requeues p/t/c/n": _requeues,  # preemptions, time-outs, crashes, node failures
    "checkpoint": _checkpoint,
}
LEFT = ("run", "state", "job", "nodes")
SPARED = ("data wait", "epoch", "nodes", "images/s", "requeues p/t/c/n", "job", "checkpoint")  # on a narrow terminal
