"""Arguments of a conversion, and the files that it writes: refused before it starts where they cannot be."""

import stat
from pathlib import Path

from kilobatch.data.beton_note import names_path, note_path
from kilobatch.data.errors import UserError
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import LONGEST
from kilobatch.data.sources.journal import journal_path
from kilobatch.data.sources.path_names import printable


def partial_files(out: Path) -> list[Path]:
    """Where the .beton, its names and its note are written, before they are renamed."""
    return [path.with_name(path.name + ".partial") for path in (out, names_path(out), note_path(out))]


def check_arguments(out: Path, encoding: Encoding, threads: int) -> None:
    """Raises UserError where `out` cannot be a .beton, or a number is out of its bounds."""
    shown = printable(str(out))
    if not out.name or out.name == "..":
        raise UserError(f"'{shown}' is a folder; give the name of a file to write, such as {shown}/train.beton")
    if out.suffix != ".beton":
        raise UserError(f"{shown} does not end in .beton; write to {printable(str(out.with_suffix('.beton')))}")
    if not out.parent.is_dir():
        raise UserError(f"{shown} cannot be written: there is no folder {printable(str(out.parent))}; make it first")
    for path in (out, names_path(out), note_path(out), *partial_files(out), journal_path(out)):
        _refuse_other_than_file(path)
    for name, value, highest in (
        ("max-side", encoding.max_side, LONGEST),
        ("min-side", encoding.min_side, LONGEST),
        ("quality", encoding.quality, 100),
        ("threads", threads, 1024),
    ):
        if value is not None and not 1 <= value <= highest:
            raise UserError(f"--{name} is {value}; it must be from 1 to {highest}")
    if encoding.min_side is not None and (encoding.max_side or 0) < encoding.min_side:
        raise UserError(
            f"--min-side {encoding.min_side} says how far --max-side may shrink the shorter side; give a --max-side of "
            f"{encoding.min_side} or more"
        )


def _refuse_other_than_file(path: Path) -> None:
    """Refuses a folder, a pipe or a device in the place of a file that will be written or replaced."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a file"
        raise UserError(f"{printable(str(path))} is {kind}; give another name, since a file has to be written there")
