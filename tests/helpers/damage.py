"""Damages files as disks, copies and editors do: flipped bits, cuts, pages of zeros, other values, no file at all."""

import json
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

PAGE = 4096
DEEP = 2000  # brackets, which no recursive reader survives
# what stands in place of a value, or of a whole file of JSON or YAML
OTHER_VALUES = (None, True, -1, 0, 0.5, 10**30, 1e308, float("nan"), "", "text", "\x00", "-x", [], [[1]], {}, {"a": 1})
OTHER_FILES = {
    "null": b"null",
    "a number": b"3",
    "text": b'"text"',
    "a list": b"[1, 2]",
    "an empty object": b"{}",
    "another object": b'{"step": 1, "run": {}, "a": [null]}',
    "a number of 5,000 digits": b'{"step": ' + b"9" * 5000 + b"}",
    "too large a number": b'{"step": 1e999}',
    "deep brackets": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "open brackets": b"[" * DEEP,
    "no UTF-8": b"\xff\xfe\x00run",
    "zeros": bytes(5000),
    "half a surrogate": b'{"run": "\\ud800"}',
    "a key twice": b'{"run": {}, "run": {}}',
}
Damage = Callable[[Path], None]


def byte_damages(content: bytes, random: np.random.Generator, each: int) -> Iterator[tuple[str, bytes]]:
    """The content with a flipped bit, cut, with a page of zeros, with bytes inserted and left out: `each` of each kind;
    then cut to nothing. All of them differ from the content."""
    for _ in range(each if content else 0):
        place, bit = int(random.integers(len(content))), int(random.integers(8))
        yield f"bit {bit} of byte {place}", content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
        yield f"cut to {place} bytes", content[:place]
        page = place // PAGE * PAGE
        zeros = bytes(len(content[page : page + PAGE]))
        if any(content[page : page + PAGE]):
            yield f"zeros from {page}", content[:page] + zeros + content[page + PAGE :]
        new = random.bytes(int(random.integers(1, 9)))
        yield f"{new!r} before byte {place}", content[:place] + new + content[place:]
        end = place + int(random.integers(1, 9))
        yield f"without bytes {place} to {end}", content[:place] + content[end:]
    yield "cut to 0 bytes", b""


def value_damages(values: Any, random: np.random.Generator, each: int) -> Iterator[tuple[str, Any]]:
    """The JSON value with one of its parts replaced by, or left out for, something of another kind."""
    keys = list(_keys(values))
    for _ in range(each if keys else 0):
        *at, last = keys[int(random.integers(len(keys)))]
        changed = deepcopy(values)
        within = changed
        for key in at:
            within = within[key]
        if random.random() < 0.2:
            del within[last]
            yield f"without {[*at, last]}", changed
            continue
        old, within[last] = within[last], OTHER_VALUES[int(random.integers(len(OTHER_VALUES)))]
        if repr(old) != repr(within[last]):
            yield f"{[*at, last]} = {within[last]!r}", changed


def _keys(values: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    parts = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, inner in parts:
        yield (*at, key)
        yield from _keys(inner, (*at, key))


def damages(
    path: Path, random: np.random.Generator, *, each: int, of_values: int = 0, load: Callable[[str], Any] = json.loads
) -> Iterator[tuple[str, Damage]]:
    """What may befall a file, by name: each item changes the file that it is called with.

    each: damages of each kind by bytes; of_values: parts of another kind, where the file holds JSON or, by `load`, YAML
    that JSON can say; with any of these, the whole file of another kind, too.
    """
    content = path.read_bytes()
    contents = list(byte_damages(content, random, each))
    if of_values:
        contents += [(f"{name} instead", other) for name, other in OTHER_FILES.items()]
        damaged = value_damages(load(content.decode()), random, of_values)
        contents += [(name, json.dumps(values).encode()) for name, values in damaged]
    for name, changed in contents:
        yield name, _writing(changed)
    yield "missing", Path.unlink
    yield "a folder instead", _folder
    yield "a dangling link instead", _link


def _writing(content: bytes) -> Damage:
    return lambda path: void(path.write_bytes(content))


def void(result: object) -> None:
    """Drops a result."""


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("gone")


def put_back(folder: Path, whole: Path) -> None:
    """Replaces a folder by a copy of a whole one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder, symlinks=True)
