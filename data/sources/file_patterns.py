"""Patterns of files: PATH with *, ?, [a-z] as the shell has them, and braces: train-{000..127}.tar, {a,b}.tar."""

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.data.sources.path_names import in_one_order

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST = 1_000_000  # files that braces may stand for


def files_of_pattern(scheme: str, pattern: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that a pattern stands for: in the order of its braces, and sorted where it has other signs. A folder
    stands for all files in it with one of the suffixes. Raises UserError where there is none, or one is absent."""
    if pattern.is_dir():
        names = in_one_order(path.name for path in pattern.iterdir() if path.suffix.lower() in suffixes)
        found = [pattern / name for name in names if not name.startswith(".")]
        if not found:
            raise UserError(f"{scheme}:{pattern} is a folder without a {' or '.join(suffixes)} file; name the files")
        return found
    if pattern.exists():  # braces and brackets may be a part of a name
        return [pattern]
    files: list[Path] = []
    absent: list[str] = []
    for text in _braces(scheme, str(pattern), str(pattern)):
        if glob.has_magic(text):
            matched = in_one_order(glob.glob(text))  # noqa: PTH207 - keeps the path as it is written
            files += map(Path, matched)
            absent += [] if matched else [text]
        elif Path(text).exists():
            files.append(Path(text))
        else:
            absent.append(text)
    if absent:
        few = f", and {len(absent) - 3:,} more" if len(absent) > 3 else ""
        raise UserError(
            f"{scheme}:{pattern}: there is no file {', '.join(absent[:3])}{few}; correct the pattern (quote it for the "
            "shell), or copy what is missing"
        )
    folder = next((file for file in files if file.is_dir()), None)
    if folder is not None:
        raise UserError(f"{scheme}:{pattern}: {folder} is a folder; name files, such as {folder}/*{suffixes[0]}")
    return list(dict.fromkeys(files))


def _braces(scheme: str, text: str, whole: str) -> Iterator[str]:
    """The texts that one with braces stands for: numbers keep their width, as in {008..012}."""
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    numbers = _RANGE.fullmatch(found[1])
    if numbers:
        low, high = int(numbers[1]), int(numbers[2])
        if not 0 <= high - low < MOST:
            raise UserError(f"{scheme}:{whole}: {found[0]} should go from a number to a higher one, as in {{000..127}}")
        width = len(numbers[1]) if numbers[1].startswith("0") or len(numbers[1]) == len(numbers[2]) else 0
        parts = [f"{number:0{width}}" for number in range(low, high + 1)]
    elif "," in found[1]:
        parts = found[1].split(",")
    else:
        raise UserError(f"{scheme}:{whole}: {found[0]} stands for nothing; write {{000..127}} or {{a,b}}")
    for part in parts:
        yield from _braces(scheme, text[: found.start()] + part + text[found.end() :], whole)


def names_of_option(where: str, files: list[Path], options: Mapping[str, str]) -> list[str] | None:
    """The names in the file that the option `classes` names, beside the first of the source's files; None: without it.
    Raises UserError."""
    if "classes" not in options:
        return None
    return names_in_file(where, files[0].parent / Path(options["classes"]).expanduser())


def names_in_file(where: str, file: Path) -> list[str]:
    """The names of classes in a text file, one in each line. Raises UserError."""
    try:
        names = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{where}: classes={file} cannot be read: {why}; name a text file") from None
    while names and not names[-1]:
        names.pop()
    if not all(names) or len({*names}) < len(names) or not names:
        raise UserError(f"{where}: classes={file} should have a name in each line, and no name twice; correct it")
    return names
