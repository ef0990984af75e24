"""Source parquet:PATTERN: images in a column of Parquet files, as Hugging Face's hub has them."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrow_tables import TableImages, require_pyarrow
from kilobatch.data.sources.file_patterns import files_of_pattern, names_of_option
from kilobatch.data.sources.open_cache import opened_once

HELD = 1 << 29  # bytes of row groups that are kept beside the two newest


class ParquetImages(TableImages):
    """Images of Parquet files, of which a row group is read at once: groups of some hundred rows take little memory."""

    def __init__(self, where: str, files: list[Path], options: Mapping[str, str], names: list[str] | None) -> None:
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._places: list[tuple[Path, int]] = []  # of each row group: its file, and its number there
        self._first = np.zeros(0, np.int64)  # the first image of each row group, and behind them the number of images
        super().__init__(where, files, options, names)

    def _schema(self) -> Any:
        from pyarrow import parquet

        return parquet.read_schema(self.files[0])

    def _read_columns(self) -> Iterator[tuple[Path, Iterable[str | None], Any | None]]:
        from pyarrow import parquet

        image, label, rows = self.columns.image, self.columns.label, [0]
        for path in self.files:
            with parquet.ParquetFile(path) as file:
                for name in filter(None, (image, label)):
                    if name not in file.schema_arrow.names:
                        raise UserError(f"{self.where}: {path} has no column '{name}', and {self.files[0]} has one")
                for group in range(file.num_row_groups):
                    self._places.append((path, group))
                    rows.append(file.metadata.row_group(group).num_rows)
                labels = None if label is None else file.read(columns=[label]).column(0).combine_chunks()
                if self.columns.paths:
                    chunks = file.read(columns=[f"{image}.path"]).column(0).chunks
                    yield path, (text for chunk in chunks for text in chunk.field("path").to_pylist()), labels
                else:
                    yield path, [None] * file.metadata.num_rows, labels
        self._first = np.cumsum(rows)

    def _cell(self, i: int) -> Any:
        group = int(np.searchsorted(self._first, i, side="right")) - 1
        return self._group(group)[i - int(self._first[group])].as_py()

    def _group(self, number: int) -> Any:
        """The images of a row group. One thread reads it, the others wait for it."""
        from pyarrow import parquet

        with self._lock:
            if number not in self._groups:
                path, group = self._places[number]
                with parquet.ParquetFile(path) as file:
                    self._groups[number] = file.read_row_group(group, columns=[self.columns.image]).column(0)
                while len(self._groups) > 2 and sum(column.nbytes for column in self._groups.values()) > HELD:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(number)
            return self._groups[number]


def open_parquet(pattern: Path, options: Mapping[str, str]) -> ParquetImages:
    """parquet:PATTERN. Raises UserError."""
    where = f"parquet:{pattern}"
    files = files_of_pattern("parquet", pattern, (".parquet",))
    names = names_of_option(where, files, options)
    require_pyarrow(where)
    return opened_once(
        ParquetImages,
        files,
        lambda: ParquetImages(where, files, options, names),
        *sorted(options.items()),
        *(names or ()),
    )
