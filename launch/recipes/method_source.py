"""What a method's file declares, read without importing it: that would import torch, which takes seconds."""

import ast
import builtins
import importlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kilobatch.methods import papers

FOLDER = Path(papers.__file__).parent


@dataclass(frozen=True)
class Declared:
    """The one Method of a file. arguments: of its constructor by keyword, each a type and a default (... for none);
    views: how many of each image it takes, None for any number; classifies: whether it has logits; head_layers: of its
    projection head, or the argument that says how many."""

    class_name: str
    arguments: dict[str, tuple[Any, Any]]
    views: int | None
    classifies: bool
    head_layers: int | str


def files() -> list[str]:
    """The names of all files in methods/."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


@cache
def declared(name: str) -> Declared | None:
    """The Method that methods/<name>.py defines, derived from Method or from another file's; None without one."""
    file = _file(name)
    found = [lines for cls in file.classes.values() if (lines := _lineage(file, cls))]
    assert len(found) <= 1, f"methods/{name}.py defines {len(found)} methods; a file holds one"
    if not found:
        return None
    arguments: dict[str, tuple[Any, Any]] = {}
    for origin, cls in found[0]:
        if constructor := _constructor(cls):
            arguments = origin.arguments(constructor)
            break

    def told(attribute: str, default: Any) -> Any:
        return next((value for origin, cls in found[0] for value in origin.assigned_in(cls, attribute)), default)

    return Declared(
        found[0][0][1].name,
        arguments,
        views=told("views", None),
        classifies=told("classifies", False),
        head_layers=told("head_layers", 0),
    )


class _File:
    """A file of methods/: its classes, and what the other names at its top stand for."""

    def __init__(self, name: str) -> None:
        self.path = FOLDER / f"{name}.py"
        self.classes: dict[str, ast.ClassDef] = {}
        self.imported: dict[str, tuple[str, str | None]] = {}  # name -> module and what of it; None: itself
        self.assigned: dict[str, ast.expr] = {}
        for node in ast.parse(self.path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.ImportFrom) and node.module:
                self.imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                self.imported |= {alias.asname or alias.name: (alias.name, None) for alias in node.names}
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.assigned |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}

    def arguments(self, constructor: ast.FunctionDef) -> dict[str, tuple[Any, Any]]:
        found: dict[str, tuple[Any, Any]] = {}
        for argument, default in zip(constructor.args.kwonlyargs, constructor.args.kw_defaults, strict=True):
            assert argument.annotation, f"{self.path}: argument '{argument.arg}' has no type"
            found[argument.arg] = (self.value(argument.annotation), ... if default is None else self.value(default))
        return found

    def assigned_in(self, cls: ast.ClassDef, name: str) -> list[Any]:
        """The value that the class's body gives to `name`, if it does."""
        return [
            self.value(node.value)
            for node in cls.body
            if isinstance(node, ast.AnnAssign) and node.value and ast.unparse(node.target) == name
        ]

    def value(self, expression: ast.expr) -> Any:
        names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
        known = {name: self.named(name) for name in names if not hasattr(builtins, name)}
        return eval(compile(ast.Expression(expression), str(self.path), "eval"), known)

    def named(self, name: str) -> Any:
        if name in self.assigned:
            return self.value(self.assigned[name])
        assert name in self.imported, f"{self.path}: '{name}' is neither imported nor assigned at the top of the file"
        module, attribute = self.imported[name]
        assert _loads_no_torch(module), (
            f"{self.path}: a constructor's types and defaults are read without torch, so '{name}' cannot come from "
            f"{module}: take it from the standard library, from pydantic, or from a file in methods/ or data/ "
            "whose name ends in 'options' and which imports no torch"
        )
        loaded = importlib.import_module(module)
        return loaded if attribute is None else getattr(loaded, attribute)


_file = cache(_File)


def _loads_no_torch(module: str) -> bool:
    first, _, last = module.removeprefix("kilobatch.").partition(".")
    if first in ("methods", "data") and module.startswith("kilobatch."):
        return last.endswith("options") or last == "errors"
    return first in sys.stdlib_module_names or first == "pydantic"


def _lineage(file: _File, cls: ast.ClassDef) -> list[tuple[_File, ast.ClassDef]]:
    """The class and those that it derives from, up to Method; empty where it is no Method."""
    for base in map(ast.unparse, cls.bases):
        if base == "Method":
            return [(file, cls)]
        module, attribute = file.imported.get(base, ("", None))
        above = file.classes.get(base)
        if above is None and attribute and module.startswith("kilobatch.methods.papers."):
            file_above = _file(module.removeprefix("kilobatch.methods.papers."))
            above = file_above.classes.get(attribute)
        else:
            file_above = file
        if above and (lines := _lineage(file_above, above)):
            return [(file, cls), *lines]
    return []


def _constructor(cls: ast.ClassDef) -> ast.FunctionDef | None:
    found = (node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return next(found, None)
