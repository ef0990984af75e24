"""Reads trees of settings from YAML files and from `a.b=value`, with the file and line where each value was written."""

import math
import os
import re
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from kilobatch.data.errors import UserError
from kilobatch.methods.source_file import is_source

Key = tuple[str | int, ...]  # ("data", "views", "size"); numbers index lists
DEEPEST = 50  # levels of brackets or sections in a text; recipes have six


@dataclass
class Settings:
    """values: nested mappings, lists and scalars. origins: the key of each value -> "configs/demo.yaml line 9"."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)

    def where(self, key: Key) -> str:
        """The place where the value at `key` was written, or else that of the nearest section around it."""
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins.get(key, "the recipe")

    def under(self, over: "Settings") -> "Settings":
        """These settings with `over` on top: mappings merge, all other values are replaced. In a list of mappings a
        mapping changes those that its keys name by number: data.views.1.size=96. Raises UserError for any other.

        Another `method.name` replaces the whole method section, since its keys are that method's own.
        """
        merged = Settings(deepcopy(self.values), dict(self.origins))
        merged._merge(merged.values, over.values, (), over)
        merged.origins.update({merged._numbered(key): origin for key, origin in over.origins.items()})
        return merged

    def _merge(self, into: dict[Any, Any], values: dict[Any, Any], at: Key, over: "Settings") -> None:
        """values: those of `over` at this key."""
        for name, value in values.items():
            key = (*at, name)
            old = into.get(name)
            if isinstance(old, dict) and isinstance(value, dict) and not _another_method(key, old, value):
                self._merge(old, value, key, over)
            elif isinstance(value, dict) and isinstance(old, list) and old and isinstance(old[0], dict):
                members = dict(enumerate(old))
                self._merge(members, _by_number(value, len(old), key, over), key, over)
                into[name] = list(members.values())
            else:
                self.origins = {k: origin for k, origin in self.origins.items() if k[: len(key)] != key}
                into[name] = deepcopy(value)

    def _numbered(self, key: Key) -> Key:
        """A key in which the text of a number that indexes a list is that number."""
        found: list[str | int] = []
        inner: Any = self.values
        for part in key:
            parts: dict[Any, Any] = inner if isinstance(inner, dict) else {}
            if isinstance(inner, list):
                parts = dict(enumerate(inner))
            found.append(int(part) if isinstance(inner, list) else part)
            inner = parts.get(found[-1])
        return tuple(found)


def _by_number(values: dict[str, Any], length: int, key: Key, over: Settings) -> dict[int, Any]:
    """Changes of a list's members by their numbers. Raises UserError for a key that is no member's."""
    for name in values:
        if not (name.isdecimal() and int(name) < length):
            where, dotted = over.where((*key, name)), ".".join(map(str, key))
            raise UserError(
                f"{where}: there is no {dotted}.{name}: {dotted} is a list of {length}; name one of them "
                f"({dotted}.0 to {dotted}.{length - 1}), or give the whole list"
            )
    return {int(name): value for name, value in values.items()}


def _another_method(key: Key, old: dict[str, Any], new: dict[str, Any]) -> bool:
    if key != ("method",) or "name" not in old or "name" not in new:
        return False
    names = old["name"], new["name"]
    if all(isinstance(name, str) and is_source(name) for name in names):  # the file may have moved
        return len({name.rpartition(":")[2] for name in names}) > 1
    return names[0] != names[1]


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2's scalars: 1e-6 is a number; `off`, `no`, 010, 1:30 and dates are text. Refuses aliases, and what
    is nested so deep that a recursive reader fails."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases (*name) are not used in recipes; write it out", mark)
        self._depth += 1
        if self._depth > DEEPEST:
            raise ComposerError(None, None, f"brackets or sections are nested more than {DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def is_plain(self, node: yaml.ScalarNode) -> bool:
        """Whether a scalar is text, or has the type that its text has by itself, without a tag that names another."""
        return node.tag in (TEXT, self.resolve(yaml.ScalarNode, node.value, (True, False)))


class _Dumper(yaml.SafeDumper):
    """Writes YAML, with quotes around text that _Loader would otherwise read as another type."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


TEXT = "tag:yaml.org,2002:str"
for _yaml in (_Loader, _Dumper):
    for _tag, _pattern, _first in (
        ("null", r"~|null|", "~n"),
        ("bool", r"true|false", "tf"),
        ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
        ("float", r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)", "-+.0123456789"),
    ):
        firsts = [*_first, *([""] if _tag == "null" else [])]
        _yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), firsts)


def parse(text: str, source: str, *, lines: bool = True) -> tuple[Any, dict[Key, str]]:
    """The value of a YAML text, and the origins of all values in it.

    source: the text's name in messages and origins; lines: whether origins name the line too.
    Raises UserError for broken YAML, a key written twice, keys that are not text, and tagged objects.
    """
    origins: dict[Key, str] = {}

    def place(mark: Any) -> str:
        return f"{source} line {mark.line + 1}" if lines and mark is not None else source

    def read(node: yaml.Node, key: Key) -> Any:
        origins.setdefault(key, place(node.start_mark))
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for name_node, value_node in node.value:
                name = scalar(name_node) if isinstance(name_node, yaml.ScalarNode) else None
                if not isinstance(name, str):
                    kind = repr(name_node.value) if isinstance(name_node, yaml.ScalarNode) else f"a {name_node.id}"
                    raise UserError(f"{place(name_node.start_mark)}: keys must be text, not {kind}")
                if name in values:
                    first = origins[(*key, name)]
                    raise UserError(f"{place(name_node.start_mark)}: '{name}' stands twice (first: {first}); keep one")
                origins[(*key, name)] = place(name_node.start_mark)
                values[name] = read(value_node, (*key, name))
            return values
        if isinstance(node, yaml.SequenceNode):
            return [read(item, (*key, i)) for i, item in enumerate(node.value)]
        return scalar(node)

    def scalar(node: yaml.Node) -> Any:
        if not loader.is_plain(node):
            raise UserError(f"{place(node.start_mark)}: {node.value!r} with tag {node.tag}: only plain values are read")
        try:
            node.value.encode()
            return loader.construct_object(node)
        except UnicodeEncodeError:
            raise UserError(f"{place(node.start_mark)}: {node.value!r} holds half a character") from None
        except ValueError:  # Python reads integers of so many digits only
            raise UserError(f"{place(node.start_mark)}: a number of {len(node.value):,} digits is too long") from None

    loader: Any = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else read(node, ())), origins
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise UserError(f"{place(mark)}: not valid YAML: {problem}") from error


def read_file(path: Path) -> Settings:
    """A YAML file of settings. Raises UserError where it cannot be read or is not a mapping."""
    source = format_path(path)
    if not path.is_file():
        raise UserError(f"{source} is not a file" if path.exists() else f"there is no file {source}")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not a text file (byte {error.start} is not UTF-8); recipes are YAML") from error
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from error
    values, origins = parse(text, source)
    if values is None:
        raise UserError(f"{source} is empty; a recipe holds sections such as `data:`, or `extends: <recipe>`")
    if not isinstance(values, dict):
        raise UserError(f"{source} holds {format_value(values)}, not sections such as `data:` with keys under them")
    return Settings(values, origins | {(): source})


def dump(values: dict[str, Any]) -> str:
    """YAML text that `parse` reads back to equal values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def format_value(value: Any) -> str:
    """A value as a recipe would write it, shortened to one line of at most 60 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
    text = text.removesuffix("...\n").strip()
    return text if len(text) <= 60 else f"{text[:57]}..."


def format_path(path: Path) -> str:
    """A path relative to the working folder if it lies in it, else absolute."""
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith("..") else relative
