"""Tables of `kilobatch verify` for the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kilobatch.data.errors import UserError
from kilobatch.launch.processes.output import tell
from kilobatch.launch.recipes import method_options
from kilobatch.launch.runs.table_printing import print_table

if TYPE_CHECKING:
    from kilobatch.trainer.parity import ParityRow


def verify(method: str | None, everything: bool) -> bool:
    """Prints the parity table of a method or, with `everything`, of all of them. Returns what print_parity returns.

    Raises UserError where both or neither are given, and for a method without a formula.
    """
    if (method is None) != everything:
        raise UserError("give a method's name, such as simclr, or --all")
    if method is not None:
        return print_parity([method])
    from kilobatch.methods.parity.lookup import known

    return print_parity(sorted({*method_options.method_names(), *known()}))  # known(): also several forms of a method


def print_parity(methods: Sequence[str]) -> bool:
    """Prints a table for each method, which compares every layout of ranks × chunks with the paper's formula, and a
    summary if there are several methods.

    Returns whether every method has a table, all correct constructions agree with the formula, and all wrong ones
    differ from it. Raises UserError for a single method without a formula.
    """
    from kilobatch.methods.parity.lookup import known
    from kilobatch.trainer.parity import LIMIT, parity_tables

    tables = parity_tables(*(name for name in methods if len(methods) == 1 or name in known()), tell=tell)
    for name, rows in tables.items():
        title = f"{name}: gradients against the formula in one process, fp64"
        print_table(parity_table(title, rows), Console(emoji=False))
    if len(tables) > 1:
        print_table(_summary(tables), Console(emoji=False))
    missing = [name for name in methods if name not in tables]
    for name in missing:
        place = f"methods/parity/formulas/{name}.py"
        Console(emoji=False).print(f"[bold red]{name}: no table[/]; its formula should stand in {place}")
    limits = ", ".join(f"{limit:.0e} in {precision}" for precision, limit in LIMIT.items())
    Console(emoji=False).print(f"agrees: error at most {limits}")
    return not missing and all(row.ok for rows in tables.values() for row in rows)


def parity_table(title: str, rows: "Sequence[ParityRow]") -> Table:
    """The table of `kilobatch verify`, a line for each comparison."""
    table = Table(title=title, title_justify="left")
    table.add_column("construction", overflow="fold")
    for column in ("norm", "ranks × chunks", "error", "cosine", "norm ratio", ""):
        table.add_column(column, no_wrap=" " not in column)
    for row in rows:
        layout, verdict = row.layout, ("agrees" if row.agrees else "differs") + ("" if row.ok else ": wrong")
        table.add_row(
            row.name,
            layout.norm,
            f"{layout.ranks} × {layout.chunks}" + (f", {layout.kept} kept" if layout.kept else ""),
            f"{row.error:.0e} {row.precision}",
            f"{row.cosine:.3f}",
            f"{row.norm_ratio:.3f}",
            f"[{'green' if row.ok else 'bold red'}]{verdict}[/]",
        )
    return table


def _summary(tables: "dict[str, list[ParityRow]]") -> Table:
    """Each method's largest error over its layouts, and how many of its wrong constructions are detected."""
    summary = Table(title="all methods: the worst error over ranks × chunks", title_justify="left")
    summary.add_column("method", no_wrap=True)
    for column in ("fp64", "fp32", "what it remembers", "wrong ones found out", ""):
        summary.add_column(column)
    for name, rows in tables.items():
        errors = {
            p: max(row.error for row in rows if row.name == name and row.precision == p) for p in ("fp64", "fp32")
        }
        kept = [row.error for row in rows if row.name == f"{name}, what it remembers" and row.precision == "fp64"]
        wrong, ok = [row for row in rows if not row.right], all(row.ok for row in rows)
        summary.add_row(
            name,
            *(f"{error:.0e}" for error in errors.values()),
            f"{max(kept):.0e}" if kept else "–",
            f"{sum(row.ok for row in wrong)} of {len(wrong)}",
            f"[{'green' if ok else 'bold red'}]{'agrees' if ok else 'wrong'}[/]",
        )
    return summary
