"""Syntax of sources in recipes and commands: KIND:PATH, and options behind it as in tree:PATH?label=none.

An option begins at the first `?` behind which a name and `=` follow; the next one at an `&` of the same kind. So a `?`
in a file's name or in a pattern, and an `&` in a regular expression, stand for themselves. A value is taken as it
stands. Kinds without options take a `?` as a part of the path.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from kilobatch.data.errors import UserError, did_you_mean

# Each kind with its form, for messages.
FORMS = {
    "folder": "folder:PATH",
    "cifar10": "cifar10:ROOT",
    "cifar100": "cifar100:ROOT",
    "npz": "npz:FILE",
    "digits": "digits",
    "tree": "tree:PATH",
    "list": "list:FILE",
    "csv": "csv:FILE",
    "tar": "tar:PATTERN",
    "parquet": "parquet:PATTERN",
    "hf": "hf:FOLDER",
    "torchvision": "torchvision:NAME:ROOT",
    "python": "python:FILE.py:NAME",
}
# The options of each kind; None: any, which are arguments of the class or function that it names.
OPTIONS: Mapping[str, tuple[str, ...] | None] = MappingProxyType(
    {
        "tree": ("label",),
        "list": ("label", "root"),
        "csv": ("label", "path", "root"),
        "tar": ("label", "image", "classes"),
        "parquet": ("label", "image", "classes"),
        "hf": ("label", "image", "split"),
        "torchvision": None,
        "python": None,
    }
)
_FIRST = re.compile(r"\?(?=[A-Za-z_]\w*=)")
_NEXT = re.compile(r"&(?=[A-Za-z_]\w*=)")


@dataclass(frozen=True)
class SourceSpec:
    """The parts of a source's spec. scheme: its kind; path: of the file, folder or pattern; name: of a data set of
    torchvision or of an object in a Python file; options: by their names, as written; text: the options with their
    `?`, or nothing."""

    scheme: str
    path: Path
    name: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    text: str = ""

    def at(self, path: Path) -> str:
        """A spec of the same kind, with the same options, at another path."""
        if self.scheme == "torchvision":
            return f"{self.scheme}:{self.name}:{path}{self.text}"
        name = f":{self.name}" if self.scheme == "python" else ""
        return f"{self.scheme}:{path}{name}{self.text}"


def parse_known(spec: str, to_path: Callable[[str, str], Path]) -> SourceSpec:
    """The parts of a spec that begins with a kind and a colon. to_path: makes a path of a text and of the whole spec.
    Raises UserError."""
    scheme, _, rest = spec.partition(":")
    allowed = OPTIONS.get(scheme, ())
    begin = _FIRST.search(rest) if allowed != () else None
    where, text = (rest, "") if begin is None else (rest[: begin.start()], rest[begin.start() :])
    options = _read_options(spec, scheme, text[1:], allowed) if text else {}
    name = ""
    if scheme == "torchvision":
        name, colon, where = where.partition(":")
    elif scheme == "python":
        where, colon, name = where.rpartition(":")
    else:
        colon = ":"
    if not (where.strip() and colon and (name.strip() or scheme not in ("torchvision", "python"))):
        what = "lacks a name or a path" if scheme in ("torchvision", "python") else "names no path"
        raise UserError(f"data source '{spec}' {what}; write {FORMS[scheme]}")
    return SourceSpec(scheme, to_path(where, spec), name, MappingProxyType(options), text)


def _read_options(spec: str, scheme: str, text: str, allowed: tuple[str, ...] | None) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in _NEXT.split(text):
        name, _, value = part.partition("=")
        if allowed is not None and name not in allowed:
            raise UserError(f"data source '{spec}': {scheme}: has no option '{name}'{did_you_mean(name, allowed)}")
        if name in options:
            raise UserError(f"data source '{spec}' has the option {name} twice; leave one out")
        if not value:
            raise UserError(f"data source '{spec}': the option {name} is empty; give it a value, or leave it out")
        options[name] = value
    return options
