"""Tables for the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kilobatch.launch.recipes import catalogue

if TYPE_CHECKING:
    from kilobatch.trainer.parity import Row


def recipes() -> None:
    """The recipes and their opening lines."""
    table = Table("recipe", "what it is", show_lines=True)
    for name in catalogue.names():
        table.add_row(name, "\n".join(catalogue.opening(name)))
    Console().print(table)


def parity(methods: Sequence[str]) -> bool:
    """A table for each method: each layout of ranks × chunks against the paper's formula; of several a summary, too.
    Returns whether every method has one, all that is right agrees and all that is wrong is found out. Raises Refusal
    for a single method without one."""
    from kilobatch.methods.parity.lookup import known
    from kilobatch.trainer.parity import LIMIT, verify

    tables = verify(*(name for name in methods if len(methods) == 1 or name in known()))
    for name, rows in tables.items():
        Console().print(_table(name, rows))
    if len(tables) > 1:
        Console().print(_summary(tables))
    missing = [name for name in methods if name not in tables]
    for name in missing:
        Console().print(f"[bold red]{name}: no table[/]; its formula should stand in methods/parity/formulas/{name}.py")
    limits = ", ".join(f"{limit:.0e} in {precision}" for precision, limit in LIMIT.items())
    Console().print(f"agrees: error at most {limits}")
    return not missing and all(row.ok for rows in tables.values() for row in rows)


def _table(method: str, rows: "Sequence[Row]") -> Table:
    table = Table(title=f"{method}: gradients against the formula in one process, fp64", title_justify="left")
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


def _summary(tables: "dict[str, list[Row]]") -> Table:
    """The worst error of each method over its layouts, and how many constructions are told apart."""
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
