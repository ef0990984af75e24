"""Names of files and folders: as text that can be printed and stored, and compared in one Unicode form."""

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

_CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029]")
_WNID = re.compile(r"n\d{8}[\s_-]+(?=\S)")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def composed(name: str) -> str:
    """The name in Unicode's form NFC: macOS stores an accent as a character of its own, other systems do not."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def printable(name: str) -> str:
    """The name on one line. Bytes that are not UTF-8 and control characters are escaped: a file with such a name can
    be opened, but its name not printed or stored."""
    if name.isprintable():  # most names, and it takes a tenth of the time
        return name
    text = _CONTROL.sub(lambda found: _SHORT.get(found[0], f"\\u{ord(found[0]):04x}"), name)
    return text.encode("utf-8", "backslashreplace").decode()


def without_wnid(name: str) -> str:
    """A class's name without the WordNet number before it, as in "n01440764 tench" and "n01440764_tench"."""
    return _WNID.sub("", name, count=1) if _WNID.match(name) else name


def escaped(name: str) -> str:
    """As printable, but with each backslash doubled: two names never become the same text."""
    return printable(name.replace("\\", "\\\\"))


def in_one_order(names: Iterable[str]) -> list[str]:
    """Sorts by the composed form, so that a copy of a folder on another system has the same order."""
    names = list(names)
    if "".join(names).isascii():
        return sorted(names)
    return sorted(names, key=lambda name: (composed(name), name))


def existing_path(path: Path) -> Path:
    """The path, with each part that does not exist replaced by the one entry there that has the same composed form."""
    if str(path).isascii() or os.path.lexists(path) or path.parent == path:
        return path
    parent = existing_path(path.parent)
    try:
        near = [name for name in os.listdir(parent) if composed(name) == composed(path.name)]  # noqa: PTH208
    except OSError:
        near = []  # what is wrong with the folder is said where it is opened
    return parent / (near[0] if len(near) == 1 else path.name)
