"""`kilobatch bench`: measures what this machine does, and in the same run the rate that limits it."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from kilobatch.data.errors import UserError
from kilobatch.data.files import write_whole
from kilobatch.data.sources.specs import count_classes, count_images
from kilobatch.launch.planning.machines import kept_bench
from kilobatch.launch.planning.plan import has_images
from kilobatch.launch.processes.exit_status import this_host
from kilobatch.launch.processes.output import tell
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.data import needed_fields
from kilobatch.launch.recipes.recipe import Recipe, read_recipe
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs.table_printing import print_table

if TYPE_CHECKING:
    import torch

    from kilobatch.trainer.bench.rates import BenchRow

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
Rates = dict[str, float | str]
MOST_SAMPLES = 128  # of the step of a recipe
ABSENT_IMAGES, ABSENT_CLASSES = 100_000, 1000  # of data that are not here


def bench(
    device_option: Literal["auto", "cpu", "cuda"],
    ranks: int | None,
    file: Path | None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Prints a table of what was measured, keeps it in the cache folder for `kilobatch plan`, and writes it to `file`,
    if one is given, for `kilobatch plan --measured`.

    ranks: of the collectives; None: the most that are useful. recipe: measures the loader and a step of this one, and
    keeps nothing, as a plan computes with the rates of the same step and the same views for all recipes. Raises
    UserError for a device that this machine lacks, and for a number of ranks that it cannot have.
    """
    if recipe is not None and (file, ranks) != (None, None):
        given = "--out" if file is not None else "--workers"
        raise UserError(
            f"{given} is of the measurements that kilobatch plan takes, and those of a recipe are none; leave "
            f"{given} or the recipe out"
        )
    chosen = None if recipe is None else read_recipe(recipe, [*overrides])
    import torch

    from kilobatch.launch.worker.devices import pick_device

    device = pick_device(device_option, 0)
    title = f"on {device.type}, {torch.get_num_threads()} threads"
    console = Console(emoji=False)
    if chosen is not None:
        print_table(_table(title, _measure_recipe(*chosen, device, console)), console)
        return
    ranks = _number_of_ranks(device, ranks)
    rows, rates = _measure(device, ranks, console)
    print_table(_table(title, rows), console)
    text = result_text(device, rates, rows)
    kept = kept_bench(device.type)
    kept.parent.mkdir(parents=True, exist_ok=True)
    for path, use in ((kept, ""), (file, f" --measured {file}")):
        if path is not None:
            write_whole(path, [text])
            # rich would read ":cat:" in it as an emoji
            print(f"written: {path}; kilobatch plan RECIPE{use}" + ("" if use else " uses it on this machine"))


def result_text(device: "torch.device", rates: Rates, rows: "list[BenchRow]") -> bytes:
    """What a file of results holds: the time, this machine, the rates that a plan uses, and the table's rows."""
    import torch

    if device.type == "cuda":
        rates = {**rates, "gpu": torch.cuda.get_device_name(device)}
    now = f"{datetime.now(UTC):%Y-%m-%d at %H:%M} UTC"
    content = {"time": now, "host": this_host(), "rates": rates, "rows": [asdict(row) for row in rows]}
    return json.dumps(content, indent=2).encode()


def _number_of_ranks(device: "torch.device", ranks: int | None) -> int:
    import torch

    from kilobatch.data.cpus import spare_threads

    most = torch.cuda.device_count() if device.type == "cuda" else max(2, spare_threads(1))
    ranks = min(most, 8 if device.type == "cuda" else 2) if ranks is None else ranks
    if not 1 <= ranks <= most:
        raise UserError(f"--workers is {ranks}; here it can be 1 to {most}")
    return ranks


def _measure(device: "torch.device", ranks: int, console: Console) -> "tuple[list[BenchRow], Rates]":
    """The table's rows, and the rates that `kilobatch plan` computes with."""
    from kilobatch.trainer.bench import collectives, loader, loss

    with _measuring("loader", console):
        rows = loader.rows(device)
    with _measuring("loss", console):
        rows = [*rows, *loss.rows(device)]
    from kilobatch.trainer.bench import step

    with _measuring("step", console), _group_of_one(device):
        step_rows, flops = step.rows(device)
    rows = [*rows, *step_rows]
    rates: Rates = {"device": device.type, "flops": flops, "views": rows[0].rate}
    if ranks > 1:
        with _measuring("collectives", console):
            collective_rows, link = collectives.rows(device, ranks)
        rows = [*rows, *collective_rows]
        rates |= link
    return rows, rates


@contextmanager
def _measuring(what: str, console: Console) -> Iterator[None]:
    """Says what is measured: on a terminal as long as it goes on, elsewhere in a line."""
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        tell(f"measuring: {what}")
        yield


def _measure_recipe(recipe: Recipe, settings: Settings, device: "torch.device", console: Console) -> "list[BenchRow]":
    """The rows of a recipe: its views of photographs, and a step of up to MOST_SAMPLES images on one worker. Fields are
    zeros in the shapes that its data have. Raises UserError for a recipe that one worker cannot train."""
    images = None if has_images(recipe) else ABSENT_IMAGES
    small = {"batch": min(recipe.data.batch, MOST_SAMPLES)}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=small)})
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"chunks": 1, "zero": 0})})
    check(recipe, 1, settings, images=images, begun=True)
    forms = needed_fields(recipe)
    from kilobatch.data.batch import blank
    from kilobatch.launch.worker import devices, pretrained
    from kilobatch.methods.method import DataFacts
    from kilobatch.trainer.bench import loader, step
    from kilobatch.trainer.optim.optimizers import build_optimizer

    with _measuring("loader", console):
        rows = loader.rows(device, recipe.data.groups)
    facts = DataFacts(ABSENT_IMAGES, ABSENT_CLASSES)
    if images is None:
        facts = DataFacts(count_images(recipe.data.train, "train"), count_classes(recipe.data.train, "train"))
    method = pretrained.build_of_recipe(recipe, facts)
    method.load_pretrained(pretrained.load_method, fresh=True)
    method.to(device)
    optimizer = build_optimizer(recipe.optimizer, method, recipe.data.batch)
    batch, names = blank(recipe.data.batch, recipe.data.groups, forms), (recipe.method.name, recipe.encoder.name)
    with _measuring("step", console), _group_of_one(device):
        options = recipe.engine.decided(devices.least_precision(device)).options()
        return [*rows, *step.rows_of(method, optimizer, options, batch, *names)]


@contextmanager
def _group_of_one(device: "torch.device") -> Iterator[None]:
    """A process group of this process alone, which the engine cannot do without."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _table(title: str, rows: "list[BenchRow]") -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("what", "rate", "limit", "share", "limited by"):
        table.add_column(column, justify="right" if column in ("rate", "limit", "share") else "left")
    for row in rows:
        share = f"{row.rate / row.limit:.0%}"
        table.add_row(row.what, _rate(row.rate, row.unit), _rate(row.limit, row.unit), share, row.limited_by)
    return table


def _rate(value: float, unit: str) -> str:
    for factor, prefix in PREFIXES:
        if unit in ("FLOP", "B") and value >= factor:
            return f"{value / factor:,.2f} {prefix}{unit}/s"
    return f"{value:,.0f} {unit}/s"
