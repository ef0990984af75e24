"""Prints tables and lines whole on narrow terminals: a number without its last digits is another number."""

import textwrap
from collections.abc import Iterable

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_UNLIMITED = 10_000  # characters


def print_table(table: Table, console: Console) -> None:
    """Prints a table or, where it would cut or break a word of it, its rows one after another as `column: value`."""
    frame = 0 if table.box is None else 1
    widths = [_least_width(column) + 2 + frame for column in table.columns]
    if sum(widths) + frame <= console.width:
        console.print(table)
        return
    if table.title:
        console.print(table.title, style="italic")
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for number, (column, cell) in enumerate(zip(table.columns, row, strict=True)):
            text, name = _text(cell), _text(column.header)
            if text.plain:
                line = (
                    Text("  " if number else "").append_text(name).append(": " if name.plain else "").append_text(text)
                )
                console.print(line, overflow="fold")


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Prints lines; what a line has no room for goes on below it, further to the right. No word is broken."""
    for line in lines:
        below = " " * (len(line) - len(line.lstrip()) + 2)
        text = textwrap.fill(
            line, console.width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
        )
        console.print(text, soft_wrap=True, markup=False, highlight=False)


def _least_width(column: Column) -> int:
    """The width in which no word of the column is broken or, where it may not wrap, no cell."""
    measuring = Console(width=_UNLIMITED, emoji=False)
    sizes = [measuring.measure(_text(cell)) for cell in (column.header, *column.cells)]
    return max(size.maximum if column.no_wrap else size.minimum for size in sizes)


def _text(cell: object) -> Text:
    return cell if isinstance(cell, Text) else Text.from_markup(str(cell), emoji=False)
