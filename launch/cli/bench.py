"""`kilobatch bench`: measures what this machine does, and in the same run the rate that limits it."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from kilobatch.data.errors import UserError
from kilobatch.data.files import write_whole
from kilobatch.launch.runs.table_printing import print_table

if TYPE_CHECKING:
    import torch

    from kilobatch.trainer.bench.rates import BenchRow

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
Rates = dict[str, float | str]


def bench(device_option: Literal["auto", "cpu", "cuda"], ranks: int | None, file: Path | None) -> None:
    """Prints a table of what was measured and writes it to `file`, if one is given, for `kilobatch plan --measured`.

    ranks: of the collectives; None: the most that are useful. Raises UserError for a device that this machine lacks,
    and for a number of ranks that it cannot have.
    """
    import torch

    from kilobatch.launch.worker.devices import pick_device

    device = pick_device(device_option, 0)
    ranks = _number_of_ranks(device, ranks)
    title = f"on {device.type}, {torch.get_num_threads()} threads"
    console = Console(emoji=False)
    rows, rates = _measure(device, ranks, console)
    print_table(_table(title, rows), console)
    if file is not None:
        text = json.dumps({"rates": rates, "rows": [asdict(row) for row in rows]}, indent=2)
        write_whole(file, [text.encode()])
        print(f"written: {file}; kilobatch plan RECIPE --measured {file}")  # rich would read ":cat:" in it as an emoji


def _number_of_ranks(device: "torch.device", ranks: int | None) -> int:
    import torch

    from kilobatch.data.cpus import spare_threads

    most = torch.cuda.device_count() if device.type == "cuda" else max(2, spare_threads(1))
    ranks = min(most, 8 if device.type == "cuda" else 2) if ranks is None else ranks
    if not 1 <= ranks <= most:
        raise UserError(f"--ranks is {ranks}; here it can be 1 to {most}")
    return ranks


def _measure(device: "torch.device", ranks: int, console: Console) -> "tuple[list[BenchRow], Rates]":
    """The table's rows, and the rates that `kilobatch plan` computes with."""
    from kilobatch.trainer.bench import collectives, loader, loss

    with console.status("loader"):
        rows = loader.rows(device)
    with console.status("loss"):
        rows = [*rows, *loss.rows(device)]
    with console.status("step"):
        step_rows, flops = _measure_step(device)
    rows = [*rows, *step_rows]
    rates: Rates = {"device": device.type, "flops": flops, "views": rows[0].rate}
    if ranks > 1:
        with console.status("collectives"):
            collective_rows, link = collectives.rows(device, ranks)
        rows = [*rows, *collective_rows]
        rates |= link
    return rows, rates


def _measure_step(device: "torch.device") -> "tuple[list[BenchRow], float]":
    """Rows and FLOP/s of a training step in a process group of one, which the engine cannot do without."""
    import torch.distributed as dist

    from kilobatch.trainer.bench import step

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            return step.rows(device)
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
