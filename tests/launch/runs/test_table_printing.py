"""Tables on narrow terminals."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from kilobatch.launch.runs.table_printing import print_table


def printed(width: int, table: Table) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as captured:
        print_table(table, console)
    return captured.get()


@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_nothing_is_cut_off(width: int):
    table = Table("network", "encoder", title="results")
    for heading in ("parameters", "labels", "k-NN"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("student", "[bold]resnet18[/] width 64", "11.200 M", "12,811 of 1,281,167", "")
    text = printed(width, table)
    assert max(map(len, text.splitlines())) <= width
    for word in ("results", "student", "resnet18", "11.200", "12,811"):
        assert word in text
    assert "…" not in text
    assert ("│" in text) == (width == 200)
    if width == 60:
        assert text.splitlines()[1:4] == ["network: student", "  encoder: resnet18 width 64", "  parameters: 11.200 M"]


def test_a_table_that_fits_is_printed_as_it_is():
    table = Table("recipe", "text")
    table.add_row("demo", "many words that may be wrapped at their spaces")
    assert "│ demo" in printed(30, table)
