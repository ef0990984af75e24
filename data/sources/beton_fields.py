"""The fields of a .beton that FFCV wrote, and the choice of the two that hold images and labels."""

import json
from pathlib import Path

import numpy as np

from kilobatch.data.beton_layout import (
    ARRAY_ARGUMENTS,
    FIELD,
    FIELD_TYPES,
    HEADER,
    IMAGE,
    INT,
    RowLayout,
    row_layout,
)
from kilobatch.data.errors import UserError

ARRAYS = [number for number, kind in FIELD_TYPES.items() if kind.name in ("NDArrayField", "TorchTensorField")]


def read_layout(beton: Path, header: np.void, label: str | None) -> RowLayout:
    """Reads the field descriptors. label: the name of the field with the labels; None: the only one, or `label`.

    Raises UserError where FFCV could not read the fields, or where the choice is not clear.
    """
    count = int(header["num_fields"])
    with beton.open("rb") as file:
        data = file.read(HEADER.itemsize + count * FIELD.itemsize)[HEADER.itemsize :]
    if not count or len(data) < count * FIELD.itemsize:
        raise UserError(f"{beton} is damaged: it has {count:,} fields in {len(data):,} bytes; write it again with FFCV")
    fields = [_read_field(beton, i, row) for i, row in enumerate(np.frombuffer(data, FIELD, count))]
    names = [name for _, name in fields]
    if len(set(names)) < count:
        raise UserError(
            f"{beton} has two fields of one name ({', '.join(names)}), of which FFCV reads one; write it again with "
            "other names, of up to 16 letters"
        )
    image = _choose(beton, fields, IMAGE, None, "image")
    return row_layout(fields, image, _choose(beton, fields, INT, label, "label"))


def _read_field(beton: Path, i: int, row: np.void) -> tuple[int, str]:
    """Type and name."""
    kind, name = int(row["type_id"]), row["name"].tobytes().split(b"\0")[0]
    where = f"{beton}: field {i + 1}"
    if not name.isascii() or not name:
        raise UserError(f"{where} has no name that FFCV can read ({name!r}); write it again with FFCV")
    if kind not in FIELD_TYPES:
        raise UserError(
            f"{where}, {name.decode()}, is of a type that FFCV does not have (number {kind}); known: "
            f"{', '.join(kind.name for kind in FIELD_TYPES.values())}. Write the file again without it"
        )
    if kind in ARRAYS and not _is_array(row["arguments"].tobytes()):
        raise UserError(f"{where}, {name.decode()}, does not say what arrays it holds; write the file again with FFCV")
    return kind, name.decode()


def _is_array(arguments: bytes) -> bool:
    """Whether FFCV can read the shape and the type of an array's field; it fails on others when it opens the file."""
    header = np.frombuffer(arguments, ARRAY_ARGUMENTS, 1)[0]
    length = min(int(header["type_length"]), len(arguments))
    try:
        columns = json.loads(arguments[ARRAY_ARGUMENTS.itemsize :][:length].decode("ascii"))
        return (
            len(columns) == 1
            and "f0" in (np.dtype([tuple(column) for column in columns]).names or ())
            and (bool(header["shape"].any()))
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _choose(beton: Path, fields: list[tuple[int, str]], kind: int, wanted: str | None, usual: str) -> str:
    """The name of the field of this type to read."""
    names = [name for number, name in fields if number == kind]
    type_name = FIELD_TYPES[kind].name
    described = ", ".join(f"{name} ({FIELD_TYPES[number].name})" for number, name in fields)
    if wanted is not None:
        if wanted in names:
            return wanted
        raise UserError(
            f"--label-field is {wanted}; {beton} has no {type_name} of this name, its fields are {described}: name one "
            f"of type {type_name}"
        )
    if not names:
        unknown = ", of zeros where there are no labels" if kind == INT else ""
        raise UserError(
            f"{beton} has no {type_name} to take the {usual} from: its fields are {described}; write the file again "
            f"with one{unknown}"
        )
    if len(names) == 1:
        return names[0]
    if usual in names:
        return usual
    again = f"write the file again with one called {usual}"
    way_out = "name the one to use with --label-field" if kind == INT else again
    raise UserError(f"{beton} has {len(names)} fields of type {type_name}, {', '.join(names)}: {way_out}")
