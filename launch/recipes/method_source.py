"""Reads what a method's file declares without importing it: that would import torch, which takes seconds."""

import ast
import builtins
import importlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes.settings import format_path
from kilobatch.methods import papers
from kilobatch.methods.source_file import bound_names, is_source, parse_source, plain_assignment, set_on_instances

FOLDER = Path(papers.__file__).resolve().parent  # of a checkout, not the link to it under src/
PACKAGE = "kilobatch.methods.papers"
# With Method's own values:
ATTRIBUTES: dict[str, Any] = {"views": None, "further_groups": False, "jigsaw": False, "pairwise": False}
ATTRIBUTES |= {"needs": frozenset[str](), "classifies": False, "head_layers": 0}
SOURCES = (
    "take it from the standard library, from pydantic, or from a file in methods/ or data/ whose name ends in "
    "'options' and which imports no torch"
)


@dataclass(frozen=True)
class Declared:
    """The one Method of a file. arguments: of its constructor by keyword, each a type and a default (... for none);
    texts: its docstring, and those of the classes that it derives from; the others: as Method has them."""

    class_name: str
    arguments: dict[str, tuple[Any, Any]]
    views: int | None
    needs: frozenset[str]
    further_groups: bool
    jigsaw: bool
    pairwise: bool
    classifies: bool
    head_layers: int | str
    texts: tuple[str, ...]


def files() -> list[str]:
    """The names of all files in methods/papers/."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


@cache
def read_declaration(name: str) -> Declared | None:
    """The Method that methods/papers/<name>.py defines, derived from Method or from another file's, or the class of
    FILE.py:Class; None without one.

    Raises UserError, with the file and the line, for what cannot be read without importing the file.
    """
    source = parse_source(name) if is_source(name) else None
    file = _file(str(source.path.expanduser().absolute()) if source else name)
    classes = [cls for cls in file.classes.values() if source is None or cls.name == source.name]
    lineages = [lineage for cls in classes if (lineage := _lineage(file, cls))]
    if not lineages:
        return None
    if len(lineages) > 1:
        _, second = lineages[1][0]
        raise file.refusal(second.lineno, f"the file defines {len(lineages)} methods; a file holds one: move this one")
    arguments: dict[str, tuple[Any, Any]] = {}
    for origin, cls in lineages[0]:
        if constructor := origin.constructor(cls):
            arguments = origin.arguments(constructor)
            break
    attributes = dict(ATTRIBUTES)
    for origin, cls in reversed(lineages[0]):
        attributes |= origin.attributes(cls)
    texts = tuple(ast.get_docstring(cls) or "" for _, cls in lineages[0])
    return Declared(lineages[0][0][1].name, arguments, texts=texts, **attributes)


class _File:
    """A file of methods/papers/, or FILE.py: its classes, and what the other names at its top stand for."""

    def __init__(self, name: str) -> None:
        self.path = Path(name) if name.endswith(".py") else FOLDER / f"{name}.py"
        self.classes: dict[str, ast.ClassDef] = {}
        self.imported: dict[str, tuple[str, str | None]] = {}  # name -> module and what of it; None: itself
        self.assigned: dict[str, ast.expr] = {}
        self.unreadable: dict[str, int] = {}  # names bound in any other way, and the line
        try:
            statements = ast.parse(self.path.read_text("utf-8")).body
        except SyntaxError as error:
            raise self.refusal(error.lineno or 1, f"not valid Python: {error.msg}") from error
        for node in statements:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                module = ".".join(filter(None, [_package(node.level), node.module]))
                self.imported |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                self.imported |= {alias.asname or alias.name: (alias.name, None) for alias in node.names}
            else:
                names, value = plain_assignment(node)
                for bound, line in bound_names(node):
                    if value and bound in names and bound not in self.assigned:
                        self.assigned[bound] = value
                    else:  # also at the second assignment: which of the two holds where it is used?
                        self.unreadable[bound] = line

    def refusal(self, line: int, message: str) -> UserError:
        return UserError(f"{format_path(self.path)} line {line}: {message}")

    def constructor(self, cls: ast.ClassDef) -> ast.FunctionDef | None:
        """The class's own __init__. Raises UserError where it is made in another way than by `def`."""
        found = None
        for node in cls.body:
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                found = node
            elif line := dict(bound_names(node)).get("__init__"):
                raise self.refusal(
                    line,
                    f"{cls.name}.__init__ cannot be read without importing this file: write `def __init__` directly "
                    "in the class's body",
                )
        return found

    def arguments(self, constructor: ast.FunctionDef) -> dict[str, tuple[Any, Any]]:
        """Type and default of each keyword argument. Raises UserError for an argument that no recipe could give."""
        signature = constructor.args
        positional = [*signature.posonlyargs, *signature.args][2:]  # after self and the encoder
        if extra := [*positional, *filter(None, (signature.vararg, signature.kwarg))]:
            raise self.refusal(
                extra[0].lineno,
                f"argument '{extra[0].arg}' is not given by keyword alone, so that no recipe can set it; write the "
                "options after a `*`, each by name: def __init__(self, encoder, *, temperature: float = 0.1)",
            )
        found: dict[str, tuple[Any, Any]] = {}
        for argument, default in zip(signature.kwonlyargs, signature.kw_defaults, strict=True):
            annotation = argument.annotation
            if annotation is None or (isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)):
                has = "no type" if annotation is None else "its type in quotes"
                raise self.refusal(
                    argument.lineno,
                    f"argument '{argument.arg}' has {has}; write one, such as `{argument.arg}: float`, by which "
                    "recipes are validated",
                )
            found[argument.arg] = (self.value(annotation), ... if default is None else self.value(default))
        return found

    def attributes(self, cls: ast.ClassDef) -> dict[str, Any]:
        """The values that the class's body gives to any of ATTRIBUTES, by `name = value` or `name: type = value`.

        Raises UserError where it sets one in another way.
        """
        found = {}
        for node in cls.body:
            names, value = plain_assignment(node)
            for name, line in (*bound_names(node), *set_on_instances(node)):
                if name in ATTRIBUTES and name in names and value:
                    found[name] = self.value(value)
                elif name in ATTRIBUTES:
                    raise self.refusal(
                        line,
                        f"{cls.name}.{name} cannot be read without importing this file: write `{name} = VALUE` "
                        "directly in the class's body, under no condition",
                    )
        return found

    def value(self, expression: ast.expr) -> Any:
        """What an expression comes to. Raises UserError for one that needs torch, or that fails."""
        nodes = list(ast.walk(expression))
        names = [node for node in nodes if isinstance(node, ast.Name)]
        inner = {node.arg for node in nodes if isinstance(node, ast.arg)}  # of a lambda
        inner |= {node.id for node in names if isinstance(node.ctx, ast.Store)}  # of a comprehension
        ours = self.assigned.keys() | self.imported.keys() | self.unreadable.keys() | self.classes.keys()
        needed = {node.id: node.lineno for node in names if node.id not in inner}
        known = {
            name: self.named(name, line) for name, line in needed.items() if name in ours or not hasattr(builtins, name)
        }
        try:
            return eval(compile(ast.Expression(expression), str(self.path), "eval"), known)
        except Exception as error:
            raise self.refusal(
                expression.lineno,
                f"`{ast.unparse(expression)}` cannot be evaluated ({type(error).__name__}: {error}); write a value "
                "that needs no more than the standard library and pydantic",
            ) from error

    def named(self, name: str, line: int) -> Any:
        """What a name stands for; line: where it is used. Raises UserError where that is not known without torch."""
        if name in self.unreadable or name in self.classes:
            bound = self.unreadable.get(name) or self.classes[name].lineno
            raise self.refusal(
                line,
                f"'{name}' cannot be read without importing this file, because line {bound} binds it by "
                f"something other than one plain assignment; write `{name} = VALUE` once at the top of the file, or "
                f"{SOURCES}",
            )
        if name in self.assigned:
            return self.value(self.assigned[name])
        if name not in self.imported:
            raise self.refusal(
                line,
                f"'{name}' is neither imported nor assigned at the top of the file; assign it there, or {SOURCES}",
            )
        module, attribute = self.imported[name]
        if not _loads_no_torch(module):
            raise self.refusal(
                line,
                "a constructor's types and defaults and a method's attributes are read without torch, so "
                f"'{name}' cannot come from {module}: {SOURCES}",
            )
        try:
            loaded = importlib.import_module(module)
            return loaded if attribute is None else getattr(loaded, attribute)
        except (ImportError, AttributeError) as error:
            raise self.refusal(line, f"'{name}' cannot be imported from {module} ({error}); mend its import") from error


_file = cache(_File)


def _package(level: int) -> str:
    """What the dots of a relative import in a paper's file stand for; "" without dots."""
    return PACKAGE.rsplit(".", level - 1)[0] if level else ""


def _loads_no_torch(module: str) -> bool:
    first, _, last = module.removeprefix("kilobatch.").partition(".")
    if first in ("methods", "data") and module.startswith("kilobatch."):
        return last.endswith("options") or last == "errors"
    return first in sys.stdlib_module_names or first == "pydantic"


Lineage = list[tuple[_File, ast.ClassDef]]  # a class and those that it derives from, each with its file


def _lineage(file: _File, cls: ast.ClassDef) -> Lineage:
    """The class and those that it derives from, up to Method; empty where it is no Method.

    Raises UserError for a Method with other bases beside it, which might set anything.
    """
    for base in map(ast.unparse, cls.bases):
        above = _bases(file, cls, base)
        if above is not None and len(cls.bases) > 1:
            others = ", ".join(other for other in map(ast.unparse, cls.bases) if other != base)
            raise file.refusal(
                cls.lineno,
                f"{cls.name} derives from {others} beside {base}, and only one line of classes is read; derive from "
                f"{base} alone",
            )
        if above is not None:
            return [(file, cls), *above]
    return []


def _bases(file: _File, cls: ast.ClassDef, base: str) -> Lineage | None:
    """The classes from `base` up to Method, itself left out; None where it is no Method."""
    if base in file.classes and file.classes[base] is not cls:
        return _lineage(file, file.classes[base]) or None
    prefix, _, name = base.rpartition(".")
    module, attribute = file.imported.get(prefix or base, ("", None))
    if prefix:
        module = f"{module}.{attribute}" if attribute else module
    else:
        name = attribute or ""
    if base == "Method" or (module, name) == ("kilobatch.methods.method", "Method"):
        return []
    if not module.startswith(f"{PACKAGE}."):
        return None
    stem = module.removeprefix(f"{PACKAGE}.")
    if stem not in files() or name not in _file(stem).classes:
        raise file.refusal(cls.lineno, f"{cls.name} derives from {base}, and {module} has no class '{name}'")
    return _lineage(_file(stem), _file(stem).classes[name]) or None
