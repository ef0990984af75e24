"""docs/guides/coming-from.md, read for its tests: rows of its tables, options in them, its commands and Python."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kilobatch.launch.recipes.method_options import method_names

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "coming-from.md"
TEXT = PAGE.read_text("utf-8")
METHODS = method_names()
SECTIONS = "data|method|encoder|optimizer|schedule|engine|checkpoint|evaluate|run"
OPTION = re.compile(rf"((?:{SECTIONS})(?:\.\w+)+)(?:=(.+))?")
QUOTED = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"^ {4,}kilobatch ((?:train|submit) .+)$", re.MULTILINE)


@dataclass(frozen=True)
class PageRow:
    """A row of a table that has a column "here". theirs: the cells to the left of it; here, differs: as they are."""

    section: str
    theirs: tuple[str, ...]
    here: str
    differs: str

    @property
    def id(self) -> str:
        return f"{self.section}: {' '.join(self.theirs)}"

    @property
    def methods(self) -> list[str]:
        return [token for token in QUOTED.findall(self.here) if token in METHODS]

    @property
    def options(self) -> list[tuple[str, str | None]]:
        """The options of the cell "here", each with the text of its value; None: without one."""
        return options_in(self.here)


def options_in(text: str) -> list[tuple[str, str | None]]:
    found = (OPTION.fullmatch(token) for token in QUOTED.findall(text))
    return [(match[1], match[2]) for match in found if match]


def rows() -> Iterator[PageRow]:
    section, column = "", None
    for line in TEXT.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if "here" in cells:
            column = cells.index("here")
        elif not cells:
            column = None
        elif column is not None and set("".join(cells)) - set("-"):
            yield PageRow(section, tuple(cells[:column]), cells[column], " ".join(cells[column + 1 :]))


def calls(section: str) -> list[tuple[PageRow, str, dict[str, str]]]:
    """The rows of a section that show a call: the function's name, and its arguments as they are written; ... is none
    in particular."""
    found = []
    for row in rows():
        for cell in row.theirs if row.section == section else ():
            if match := re.fullmatch(r"`([A-Za-z]\w*\(.*\))`", cell):
                call = ast.parse(match[1], mode="eval").body
                assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args, cell
                arguments = {str(word.arg): ast.unparse(word.value) for word in call.keywords}
                found.append((row, call.func.id, arguments))
    return found


def commands() -> list[list[str]]:
    """The words of each `kilobatch train`: recipe, changes, options of the command."""
    return [shlex.split(command)[1:] for command in COMMAND.findall(TEXT)]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def read_value(text: str) -> Any:
    """As a recipe has it: YAML reads 1e-4 as text and [1, 2] as a list."""

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(read, value))
        return float(value) if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value) else value

    return read(yaml.safe_load(text))
