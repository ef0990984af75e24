"""Tables for the terminal."""

from rich.console import Console
from rich.table import Table

from launch import catalogue


def recipes() -> None:
    """The recipes and their opening lines."""
    table = Table("recipe", "what it is", show_lines=True)
    for name in catalogue.names():
        table.add_row(name, "\n".join(catalogue.opening(name)))
    Console().print(table)


def parity(method: str) -> bool:
    """Each layout of ranks × chunks against the paper's formula; whether all that is right agrees and all that is
    wrong is found out. Raises Refusal for a method without such a table."""
    from trainer.verify import LIMIT, verify

    table = Table(title=f"{method}: gradients against the formula in one process, fp64", title_justify="left")
    table.add_column("construction", overflow="fold")
    for column in ("norm", "ranks × chunks", "error", "cosine", "norm ratio", ""):
        table.add_column(column, no_wrap=" " not in column)
    rows = list(verify(method))
    for row in rows:
        verdict = ("agrees" if row.agrees else "differs") + ("" if row.ok else ": wrong")
        table.add_row(
            row.name,
            row.norm,
            f"{row.ranks} × {row.chunks}",
            f"{row.error:.0e} {row.precision}",
            f"{row.cosine:.3f}",
            f"{row.norm_ratio:.3f}",
            f"[{'green' if row.ok else 'bold red'}]{verdict}[/]",
        )
    limits = ", ".join(f"{limit:.0e} in {precision}" for precision, limit in LIMIT.items())
    Console().print(table)
    Console().print(f"agrees: error at most {limits}")
    return all(row.ok for row in rows)
