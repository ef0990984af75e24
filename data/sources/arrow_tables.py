"""Sources in columns of Arrow's tables, of Parquet files and of data sets that Hugging Face's library saved.

pyarrow is imported where it is used: it is no part of the base installation, and takes a second.
"""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.data.sources.encoded_files import EncodedFiles, digest_of_files, read_file_of_source
from kilobatch.data.sources.image_files import BrokenImage
from kilobatch.data.sources.label_names import (
    NO_LABEL,
    LabelNames,
    LabelOption,
    Labels,
    numbered_classes,
    unlabelled,
)
from kilobatch.data.sources.path_list import PathList
from kilobatch.data.sources.path_names import printable

IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "picture", "photo")
LABEL = "label"


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read. image: a column of files' bytes, or of structs of bytes and path; paths:
    whether it has paths; label: None where labels are not in a column; names: of the classes of numbers."""

    image: str
    paths: bool
    label: str | None
    names: list[str] | None


class TableImages(EncodedFiles):
    """Images of a table in several files; a subclass reads the columns, and a cell of the images.

    options: label: a column of numbers or of names of classes; a regular expression with one group, searched in the
    image's path; `none`. Without, the column `label`, or the one that the file's metadata call a class. image: the
    column of the images. Both splits have all. Raises UserError.
    """

    def __init__(self, where: str, files: list[Path], options: Mapping[str, str], names: list[str] | None) -> None:
        self.where, self.files, self._options = where, files, dict(options)
        option = LabelOption(options.get("label"), where)
        with reading_arrow(where):
            columns = columns_of(where, self._schema(), options, named=option.own)
            self.columns = columns
            self._files = PathList()
            parts: list[Any] = []
            for file, paths, labels in self._read_columns():
                for row, path in enumerate(paths):
                    self._files.append(path or f"{file.name}:{row}")
                parts += [] if labels is None else [labels]
            if not len(self._files):
                raise UserError(f"{where} has no rows; give files with a row for each image")

            def read_own() -> Labels:
                if columns.label is None:
                    return unlabelled(len(self._files))
                return _labels_of_columns(where, columns.label, parts, names or columns.names)

            self.classes, self._labels = option.apply(self._files, read_own)

    def _schema(self) -> Any:
        """Arrow's schema of the first file."""
        raise NotImplementedError

    def _read_columns(self) -> Iterator[tuple[Path, Iterable[str | None], Any | None]]:
        """Each file with its images' paths, and its column of labels."""
        raise NotImplementedError

    def _cell(self, i: int) -> Any:
        """The image's value in its column: bytes, or a dictionary of bytes and path. Called by many threads."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        digest = digest_of_files(Path(), (str(file.absolute()) for file in self.files))
        digest.update(repr((self.classes, self.columns)).encode(errors="surrogateescape"))
        digest.update(self._labels.data)
        return digest.hexdigest()

    def _bytes(self, i: int) -> tuple[str, bytes]:
        name = f"{self.where}, row {i:,} ({printable(self._files[i])})"
        with reading_arrow(self.where):
            cell = self._cell(i)
        data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        if data is None and path:
            return read_file_of_source(self.files[0].parent / path, f"; {name} names it")
        if data is None:
            raise BrokenImage(f"{name} has no image")
        return name, data


def require_pyarrow(where: str) -> None:
    """Raises UserError where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{where} is read by pyarrow, and that is not installed; pip install pyarrow")


@contextmanager
def reading_arrow(where: str) -> Iterator[None]:
    """Refuses tables that pyarrow cannot read."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{where} cannot be read: {' '.join(str(error).split())}; check it, or write it again"
        ) from None


def columns_of(where: str, schema: Any, options: Mapping[str, str], named: bool) -> Columns:
    """Which columns are read. schema: Arrow's; named: whether labels stand in a column. Raises UserError."""
    features = _features(schema)
    image = _image_column(where, schema, features, options.get("image"))
    label = _label_column(where, schema, features, options.get("label")) if named else None
    import pyarrow

    kind = schema.field(image).type
    struct = pyarrow.types.is_struct(kind)
    names = [kind.field(i).name for i in range(kind.num_fields)] if struct else []
    content = kind.field("bytes").type if "bytes" in names else kind
    if not (pyarrow.types.is_binary(content) or pyarrow.types.is_large_binary(content)):
        raise UserError(
            f"{where}: the column {image} is {kind}; images are the bytes of files, or structs of bytes and path; name "
            "another column by image=COLUMN"
        )
    classes = features.get(label or "", {}).get("names")
    return Columns(image, "path" in names, label, classes if isinstance(classes, list) else None)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face's library has written of each column; nothing where another program wrote the file."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = content["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: of for name, of in found.items() if isinstance(of, dict)} if isinstance(found, dict) else {}


def _image_column(where: str, schema: Any, features: Mapping[str, dict[str, Any]], asked: str | None) -> str:
    if asked is not None:
        return _existing(where, schema, asked, "image")
    import pyarrow.types as types

    told = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    usual = [name for name in schema.names if name.lower() in IMAGE_NAMES]
    able = [field.name for field in schema if types.is_struct(field.type) or types.is_binary(field.type)]
    for found in (told, usual, able):
        if len(found) == 1:
            return found[0]
    raise UserError(
        f"{where}: which column has the images? There are {', '.join(schema.names[:20])}; name it by image=COLUMN"
    )


def _label_column(where: str, schema: Any, features: Mapping[str, dict[str, Any]], asked: str | None) -> str | None:
    if asked is not None:
        return _existing(where, schema, asked, "label")
    if LABEL in schema.names:
        return LABEL
    told = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if len(told) > 1:
        raise UserError(f"{where} has several columns of classes: {', '.join(told)}; name one by label=COLUMN, or none")
    return told[0] if told else None


def _existing(where: str, schema: Any, name: str, option: str) -> str:
    if name not in schema.names:
        raise UserError(f"{where} has no column '{name}'{did_you_mean(name, schema.names)}; correct {option}={name}")
    return name


def _labels_of_columns(where: str, name: str, parts: list[Any], names: list[str] | None) -> Labels:
    """parts: Arrow's columns of one kind, numbers or texts; an empty cell is no label."""
    import pyarrow
    import pyarrow.compute as compute
    import pyarrow.types as types

    kind = parts[0].type
    if types.is_dictionary(kind):
        kind = kind.value_type
        parts = [part.cast(kind) for part in parts]
    if types.is_integer(kind) or types.is_boolean(kind):
        columns = [compute.fill_null(part.cast(pyarrow.int64()), NO_LABEL).to_numpy() for part in parts]  # pyright: ignore[reportAttributeAccessIssue]
        numbers = np.concatenate(columns)
        return numbered_classes(numbers, names, f"{where}, column {name}"), numbers.astype(np.int32)
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise UserError(
            f"{where}: the column {name} is {kind}; labels are whole numbers or texts; name another by "
            "label=COLUMN, or use label=none"
        )
    found = LabelNames()
    for part in parts:
        for text in part.to_pylist():
            found.append(text)
    return found.finish()
