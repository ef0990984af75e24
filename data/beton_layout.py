"""FFCV's file layout (version 2): header, field descriptors, rows and allocation table.

    header | field descriptors | one row per sample | samples, none across a page's edge | allocation table

It is repeated here so that checking a file imports neither FFCV nor numba. Files that are converted here have the
fields `image` and `label`, and then an NDArrayField for each further array of their source; those of others may have
more, in any order.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

VERSION = 2
SMALLEST_PAGE = 1 << 21  # bytes

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", (16,)), ("arguments", "<u1", (1024,))])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])


class FieldType(NamedTuple):
    """One of FFCV's types of field: its name, and what it adds to a row."""

    name: str
    row: np.dtype


INT, IMAGE, ARRAY = 1, 2, 4  # FFCV's numbers of IntField, RGBImageField and NDArrayField
PLACE = np.dtype([("ptr", "<u8"), ("size", "<u8")])
FIELD_TYPES = {
    0: FieldType("FloatField", np.dtype("<f8")),
    INT: FieldType("IntField", np.dtype("<i8")),
    IMAGE: FieldType(
        "RGBImageField", np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
    ),
    3: FieldType("BytesField", PLACE),
    ARRAY: FieldType("NDArrayField", np.dtype("<u8")),
    5: FieldType("JSONField", PLACE),
    6: FieldType("TorchTensorField", np.dtype("<u8")),
}


ARRAY_ARGUMENTS = np.dtype([("shape", "<u8", (32,)), ("type_length", "<u8")])  # then the type, as JSON


class ArrayForm(NamedTuple):
    """The array that each sample has in a field: its name, its type, and its shape, which may be ()."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def arguments(self) -> np.ndarray:
        """The descriptor's arguments, (bytes,) uint8. FFCV cannot read the shape (): there it is (1,)."""
        header, shape = np.zeros(1, ARRAY_ARGUMENTS), self.shape or (1,)
        text = np.frombuffer(json.dumps(self.dtype.descr).encode("ascii"), "<u1")
        header["shape"][0, : len(shape)], header["type_length"] = shape, len(text)
        return np.concatenate([header.view("<u1"), text])


class RowLayout(BaseModel):
    """The places of image and label in a row of `bytes` bytes; fields: the names of all, in the file's order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: list[str]
    image: str
    label: str
    bytes: int
    image_offset: int
    label_offset: int

    @property
    def first_row(self) -> int:
        """The first row's place in the file."""
        return HEADER.itemsize + len(self.fields) * FIELD.itemsize

    def dtype(self) -> np.dtype:
        """mode, width, height, data_ptr and label of a row."""
        columns = dict(FIELD_TYPES[IMAGE].row.fields or {})
        return np.dtype(
            {
                "names": [*columns, "label"],
                "formats": [column[0] for column in columns.values()] + [FIELD_TYPES[INT].row],
                "offsets": [self.image_offset + int(column[1]) for column in columns.values()] + [self.label_offset],
                "itemsize": self.bytes,
            }
        )


def row_layout(fields: list[tuple[int, str]], image: str, label: str) -> RowLayout:
    """The layout of a file with these fields, (type, name) each; image, label: the names of the two to read.

    FFCV aligns the fields as C does: each begins at a multiple of its largest number's size, but what has several
    numbers begins at any byte.
    """
    row = _row(fields)
    offsets = row_offsets(fields)
    return RowLayout(
        fields=[name for _, name in fields],
        image=image,
        label=label,
        bytes=row.itemsize,
        image_offset=offsets[image],
        label_offset=offsets[label],
    )


def row_offsets(fields: list[tuple[int, str]]) -> dict[str, int]:
    """The place of each field in a row, by its name."""
    columns = (_row(fields).fields or {}).values()
    return {name: int(column[1]) for (_, name), column in zip(fields, columns, strict=True)}


def _row(fields: list[tuple[int, str]]) -> np.dtype:
    return np.dtype([("", FIELD_TYPES[kind].row) for kind, _ in fields], align=True)


OWN_FIELDS = [(IMAGE, "image"), (INT, "label")]  # of the files that are converted here, before their arrays
OWN_LAYOUT = row_layout(OWN_FIELDS, "image", "label")
SAMPLE = OWN_LAYOUT.dtype()


def descriptors(fields: list[tuple[int, str]], forms: Sequence[ArrayForm] = ()) -> np.ndarray:
    """The field descriptors as FFCV writes them, (fields,) of FIELD; of (type, name) each. forms: of those that are
    arrays."""
    rows, arguments = np.zeros(len(fields), FIELD), {form.name: form.arguments() for form in forms}
    for row, (kind, name) in zip(rows, fields, strict=True):
        row["type_id"] = kind
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), "<u1")
        if name in arguments:
            row["arguments"][: len(arguments[name])] = arguments[name]
    return rows


def allocation_of(
    data_ptr: NDArray[np.uint64], starts: NDArray[np.uint64], sizes: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """The number of the allocation that begins at each `data_ptr`; -1 where none does.

    starts, sizes: (allocations,). Of several that begin at one place the largest counts: FFCV allocates a field's
    empty value, too, at the place where the next one begins.
    """
    order = np.lexsort((sizes, starts))
    found = np.searchsorted(starts[order], data_ptr, side="right") - 1
    if len(order) == 0:
        return np.full(len(data_ptr), -1)
    return np.where(starts[order][found] == data_ptr, order[found], -1)
