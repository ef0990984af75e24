"""`kilobatch bench`: what this machine does, and what limits it, measured in the same run."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from kilobatch.data.errors import Refusal
from kilobatch.data.files import write_whole

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def bench(asked: Literal["auto", "cpu", "cuda"], ranks: int | None, file: Path | None) -> None:
    """Prints the table; writes file, if given, for `kilobatch plan --measured`. Raises Refusal for a device that is not
    here, and for ranks without one."""
    import torch
    import torch.distributed as dist

    from kilobatch.data.cpus import spare_threads
    from kilobatch.launch.worker.devices import pick_device
    from kilobatch.trainer.bench import collectives, loader, loss, step
    from kilobatch.trainer.bench.rates import Row

    device = pick_device(asked, 0)
    most = torch.cuda.device_count() if device.type == "cuda" else max(2, spare_threads(1))
    ranks = min(most, 8 if device.type == "cuda" else 2) if ranks is None else ranks
    if not 1 <= ranks <= most:
        raise Refusal(f"--ranks is {ranks}; here it can be 1 to {most}")
    console = Console()
    table = Table(title=f"on {device.type}, {torch.get_num_threads()} threads", title_justify="left")
    for column in ("what", "rate", "limit", "share", "limited by"):
        table.add_column(column, justify="right" if column in ("rate", "limit", "share") else "left")
    found: list[Row] = []

    def add(rows: list[Row]) -> None:
        found.extend(rows)
        for row in rows:
            table.add_row(
                row.what,
                _rate(row.rate, row.unit),
                _rate(row.limit, row.unit),
                f"{row.rate / row.limit:.0%}",
                row.limited_by,
            )

    with console.status("loader"):
        add(loader.rows(device))
    with console.status("loss"):
        add(loss.rows(device))
    with console.status("step"), tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            of_step, flops = step.rows(device)
        finally:
            dist.destroy_process_group()
        add(of_step)
    rates: dict[str, float | str] = {"device": device.type, "flops": flops, "views": found[0].rate}
    if ranks > 1:
        with console.status("collectives"):
            of_collectives, link = collectives.rows(device, ranks)
        add(of_collectives)
        rates |= link
    console.print(table)
    if file is not None:
        text = json.dumps({"rates": rates, "rows": [asdict(row) for row in found]}, indent=2)
        write_whole(file, [text.encode()])
        console.print(f"written: {file}; kilobatch plan RECIPE --measured {file}")


def _rate(value: float, unit: str) -> str:
    for factor, prefix in PREFIXES:
        if unit in ("FLOP", "B") and value >= factor:
            return f"{value / factor:,.2f} {prefix}{unit}/s"
    return f"{value:,.0f} {unit}/s"
