"""A small model of the project's Python files: their imports, classes and functions, read by ast and never imported."""

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

FOLDERS = ("launch", "trainer", "methods", "data")  # a folder imports from itself and from those to its right
PACKAGE = "kilobatch"


@dataclass(frozen=True)
class Import:
    """module: dotted; `from a import b` stands as a.b, whether b is a module or a name inside a.
    when: at the import of the file (top), inside a function (lazy), or for the type checker alone (types)."""

    module: str
    line: int
    when: Literal["top", "lazy", "types"]


@dataclass(frozen=True)
class Class:
    name: str
    line: int
    bases: tuple[str, ...]  # the last part of each, without aliases: `import x as y; class A(y.B)` has B


@dataclass(frozen=True)
class Function:
    name: str
    line: int
    lines: int


@dataclass(frozen=True)
class SourceFile:
    path: str  # from the root, with slashes
    lines: int
    docstring: str | None
    statements: int  # at the top of the file, the docstring included
    imports: tuple[Import, ...]
    classes: tuple[Class, ...]  # at the top of the file
    functions: tuple[Function, ...]  # all, methods and inner ones included

    @property
    def folder(self) -> str:
        return self.path.rpartition("/")[0]

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).stem


class SourceTree:
    """All Python files of a checkout by their paths. Folders that are not there are empty."""

    def __init__(self, root: Path) -> None:
        self.root = root
        paths = [path for top in (*FOLDERS, "configs", "src", "tests", "benchmarks") for path in _python(root / top)]
        self.files = {file.path: file for file in (_read(root, path) for path in sorted(paths))}

    @cached_property
    def sources(self) -> list[SourceFile]:
        """Those of the four folders."""
        return [file for file in self.files.values() if file.path.split("/")[0] in FOLDERS]

    @cached_property
    def modules(self) -> dict[str, str]:
        """Dotted name -> path, as the project imports it: kilobatch.data.errors, tests.helpers.programs."""
        found = {}
        for path in self.files:
            dotted = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            if path.split("/")[0] in (*FOLDERS, "configs"):
                dotted = f"{PACKAGE}.{dotted}"
            found[dotted.removeprefix("src.")] = path
        return found

    def imported(self, file: SourceFile) -> Iterator[tuple[Import, str]]:
        """A file's imports from the project, each with the path of what it imports."""
        for one in file.imports:
            for module in (one.module, one.module.rpartition(".")[0]):
                if module in self.modules:
                    yield one, self.modules[module]
                    break


def _python(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):  # follows no link: src/kilobatch/ links to the four folders
        yield from (Path(parent, name) for name in names if name.endswith(".py"))


def _read(root: Path, path: Path) -> SourceFile:
    text = path.read_text("utf-8")
    tree = ast.parse(text, str(path))
    relative = path.relative_to(root).as_posix()
    aliases = {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    return SourceFile(
        relative,
        len(text.splitlines()),
        ast.get_docstring(tree),
        len(tree.body),
        tuple(_imports(tree, relative, "top")),
        tuple(
            Class(node.name, node.lineno, tuple(_last_part(base, aliases) for base in node.bases))
            for node in tree.body
            if isinstance(node, ast.ClassDef)
        ),
        tuple(
            Function(node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ),
    )


def _imports(node: ast.AST, path: str, when: Literal["top", "lazy", "types"]) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, when) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = f"{_package(path, child.level)}.{child.module or ''}".strip(".")
            yield from (Import(f"{module}.{alias.name}", child.lineno, when) for alias in child.names)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _imports(child, path, "lazy")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(child, path, "types" if when == "top" else when)
        else:
            yield from _imports(child, path, when)


def _package(path: str, level: int) -> str:
    """What the dots of a relative import stand for."""
    if not level:
        return ""
    parts = path.removeprefix(f"src/{PACKAGE}/").split("/")[:-level]
    return ".".join([PACKAGE, *parts])


def _last_part(base: ast.expr, aliases: dict[str, str]) -> str:
    name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
    return aliases.get(name, name)
