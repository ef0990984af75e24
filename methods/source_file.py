"""Classes and functions in files of users' own, which recipes name as FILE.py:NAME. Loads no torch by itself."""

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from kilobatch.data.errors import UserError, did_you_mean

MARK = ".py:"


class SourceFile(NamedTuple):
    """A name in a file. path: as the recipe has it."""

    path: Path
    name: str

    def read(self) -> bytes:
        """The file's content. Raises UserError where it cannot be read."""
        try:
            return self.path.expanduser().read_bytes()
        except FileNotFoundError:
            raise UserError(
                f"there is no file {self.path.expanduser().absolute()}, which should hold {self.name}; put it back, or "
                "name the place where it is now"
            ) from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error

    def refusal(self, line: int, message: str) -> UserError:
        return UserError(f"{self.path} line {line}: {message}")


def is_source(name: str) -> bool:
    """Whether a name of a recipe means something in a file of the user's own."""
    return MARK in name or name.endswith(".py")


def parse_source(name: str) -> SourceFile:
    """The file and the name in it. Raises UserError for a text that is not FILE.py:NAME."""
    path, mark, inner = name.rpartition(":")
    if not (mark and path.endswith(".py") and inner.isidentifier()):
        raise UserError(f"'{name}' is not of the form FILE.py:NAME, such as networks.py:my_network")
    return SourceFile(Path(path), inner)


def absolute_source(name: str) -> str:
    """The name with an absolute path, so that it can be used from any folder; any other name as it is."""
    if not is_source(name):
        return name
    source = parse_source(name)
    return f"{source.path.expanduser().absolute()}:{source.name}"


def source_sha256(name: str) -> str:
    """The SHA-256 of the file. Raises UserError where it cannot be read."""
    return hashlib.sha256(parse_source(name).read()).hexdigest()


def check_source(name: str, kind: type[ast.ClassDef] | type[ast.FunctionDef]) -> None:
    """Raises UserError unless the file is there, is Python, and defines the class or the function at its top. The file
    is not imported."""
    source = parse_source(name)
    content = source.read()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        raise source.refusal(line or 1, f"not valid Python: {error}") from error
    defined = [node.name for node in tree.body if isinstance(node, kind)]
    if source.name not in defined:
        word = "class" if kind is ast.ClassDef else "function"
        known = did_you_mean(source.name, defined) if defined else f"; it has no {word} at its top"
        raise UserError(f"{source.path} defines no {word} '{source.name}'{known}")


def load_source(name: str) -> Any:
    """The class or function that the file defines; runs the file once in a process. Raises UserError for an absent
    file, and what the file itself raises."""
    source = parse_source(name)
    source.read()
    return getattr(_module(source.path.expanduser().absolute()), source.name)


@cache
def _module(path: Path) -> Any:
    # Under a name of its own: two files of one name in two folders are two modules. It is known to sys.modules, as
    # dataclasses and pickle ask for it there.
    name = f"kilobatch_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def plain_assignment(node: ast.stmt) -> tuple[list[str], ast.expr | None]:
    """The names and the value of `name = value` and `name: type = value`; none and None for any other statement."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return [], None
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return (names, node.value) if len(names) == len(targets) else ([], None)


def bound_names(node: ast.AST) -> Iterator[tuple[str, int]]:
    """The names that a statement binds in its own scope, and the lines. A type without a value binds nothing."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name, node.lineno
    elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id, node.lineno
    elif isinstance(node, ast.alias):
        yield node.asname or node.name.partition(".")[0], node.lineno
    elif not (isinstance(node, ast.AnnAssign) and node.value is None):
        if isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name, node.lineno
        if not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            for child in ast.iter_child_nodes(node):
                yield from bound_names(child)


def set_on_instances(node: ast.stmt) -> Iterator[tuple[str, int]]:
    """The attributes that a method sets by `self.name = value`, and the lines."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and ast.unparse(inner.value) == "self":
            yield inner.attr, inner.lineno
