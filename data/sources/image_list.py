"""Sources list:FILE and csv:FILE: images that a text file names, one in each line or row, with their labels."""

import codecs
import csv
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.data.sources.encoded_files import EncodedFiles, digest_of_files, read_file_of_source
from kilobatch.data.sources.label_names import NONE, LabelNames, LabelOption
from kilobatch.data.sources.open_cache import opened_once
from kilobatch.data.sources.path_list import PathList
from kilobatch.data.sources.path_names import existing_path, printable

PATH, LABEL = "path", "label"  # the columns of a table, where the spec names no others
Row = tuple[str, str | None]  # an image's path as it is written, and the name of its class


class ImageList(EncodedFiles):
    """Images by their paths. file: that names them; root: the folder that relative paths start from.

    label: a regular expression with one group, searched in the path as written; `none`; None: the file has the labels.
    An image without one has the label -1; without any there are no classes. Both splits have all images.
    """

    def __init__(self, scheme: str, file: Path, rows: Iterator[Row], root: str | None, label: str | None) -> None:
        where = f"{scheme}:{file}"
        self.root = file.parent if root is None else file.parent / Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"{where}: root is {self.root}, and there is no such folder; name the images' folder")
        option = LabelOption(label, where)
        self._files, names, self._known = PathList(), LabelNames(), f"; {printable(str(file))} names it"
        for path, name in rows:
            self._files.append(path)
            if option.own:
                names.append(name)
        if not len(self._files):
            raise UserError(f"{where} names no image; write the path of one in each line")
        self.classes, self._labels = option.apply(self._files, names.finish)

    def fingerprint(self) -> str:
        digest = digest_of_files(self.root, self._files)
        digest.update(repr(self.classes).encode(errors="surrogateescape"))
        digest.update(self._labels.data)
        return digest.hexdigest()

    def _bytes(self, i: int) -> tuple[str, bytes]:
        return read_file_of_source(self.root / self._files[i], self._known)


def open_list(file: Path, options: Mapping[str, str]) -> ImageList:
    """list:FILE: a path in each line and, behind a tab, the name of its class where it has one. Raises UserError."""
    file = existing_path(file)
    _refuse_no_file("list", file, "write the path of an image in each line, with its class behind a tab")
    label = options.get("label")
    if label not in (None, NONE) and "(" not in (label or ""):
        raise UserError(
            f"list:{file}: label is '{label}'; use none, a regular expression with one group, or leave it out: then a "
            "class stands behind a tab in each line"
        )
    return opened_once(
        ImageList,
        [file],
        lambda: ImageList("list", file, _lines(file), options.get("root"), label),
        *sorted(options.items()),
    )


def open_csv(file: Path, options: Mapping[str, str]) -> ImageList:
    """csv:FILE: a table with a line of names of columns; commas between these or, in a .tsv, tabs. Raises UserError."""
    file = existing_path(file)
    _refuse_no_file("csv", file, "write the names of its columns in the first line, one of them path")
    label = options.get("label")
    column = label if label != NONE and "(" not in (label or "") else None
    return opened_once(
        ImageList,
        [file],
        lambda: ImageList(
            "csv",
            file,
            _rows(file, options.get("path"), column, LABEL if label is None else None),
            options.get("root"),
            None if column else label,
        ),
        *sorted(options.items()),
    )


def _refuse_no_file(scheme: str, file: Path, way_out: str) -> None:
    if file.is_dir():
        raise UserError(f"{scheme}:{file} is a folder; give a file, or tree:{file}")
    if not file.exists():
        raise UserError(f"{scheme}:{file}: there is no such file; {way_out}")


@contextmanager
def _reading(scheme: str, file: Path) -> Iterator[None]:
    """Refuses a file that cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{scheme}:{file} cannot be read: {error.strerror}; check its permissions") from error


def _lines(file: Path) -> Iterator[Row]:
    """Lines end at line feeds alone, since names may hold other separators; bytes that are not UTF-8 may stand in
    them."""
    with _reading("list", file), file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            text = line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "surrogateescape")
            if not text.strip():
                continue
            path, _, label = text.partition("\t")
            _refuse_line("list", file, number, path)
            yield path, label.strip() or None


def _rows(file: Path, path: str | None, label: str | None, usual_label: str | None) -> Iterator[Row]:
    """path, label: names of columns that the spec names; usual_label: one that is taken where there is such a one."""
    with _reading("csv", file), file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
        header = [name.strip() for name in next(rows, [])]
        at = _column(file, header, path or PATH, "path")
        if label is None:
            label_at = header.index(usual_label) if usual_label in header else None
        else:
            label_at = _column(file, header, label, "label")
        try:
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"csv:{file} line {rows.line_num} has {len(row)} columns, and the first line names "
                        f"{len(header)}; mend the line (quote a value that has a comma in it)"
                    )
                _refuse_line("csv", file, rows.line_num, row[at])
                yield row[at], None if label_at is None else row[label_at].strip() or None
        except csv.Error as error:
            raise UserError(f"csv:{file} line {rows.line_num} cannot be read: {error}; mend the line") from None


def _column(file: Path, header: list[str], name: str, option: str) -> int:
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        raise UserError(f"csv:{file} has several columns called '{name}'; rename all but one")
    known = did_you_mean(name, itertools.islice(header, 20))
    raise UserError(f"csv:{file} has no column '{name}'{known}; name one as in csv:{file}?{option}=COLUMN")


def _refuse_line(scheme: str, file: Path, number: int, path: str) -> None:
    """Refuses a line whose path cannot be one."""
    if not path.strip() or "\0" in path:
        what = "has a character that no path has" if path.strip() else "names no path"
        raise UserError(f"{scheme}:{file} line {number} {what}; write the path of an image there")
