"""The writer of .beton files."""

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton_layout import (
    ALLOCATION,
    ARRAY,
    HEADER,
    OWN_FIELDS,
    VERSION,
    ArrayForm,
    descriptors,
    row_layout,
    row_offsets,
)
from kilobatch.data.beton_note import BetonInfo, FieldNote, encode_checksums, note_path, note_text
from kilobatch.data.files import sha256


class Writer:
    """Writes samples in order to a file that is open at its start; `finish` makes it a .beton.

    The header is written last: until then the file begins with zeros. `capacity`: the largest number of samples.
    forms: of the arrays that each sample has beside image and label.
    """

    PAGE = 1 << 23  # bytes, FFCV's default; no sample crosses the edge of a page, so none may be larger

    def __init__(self, file: BinaryIO, capacity: int, forms: Sequence[ArrayForm] = ()):
        from kilobatch.data.crc32c import crc32c  # numba: a command that only knows PAGE does without

        self.crc32c = crc32c
        self.file = file
        self.samples = 0
        self.forms = list(forms)
        self.fields = [*OWN_FIELDS, *((ARRAY, form.name) for form in self.forms)]
        self.layout, self.offsets = row_layout(self.fields, "image", "label"), row_offsets(self.fields)
        self.rows = np.zeros(capacity, _row_dtype(self.layout.dtype(), [self.offsets[form.name] for form in forms]))
        self.table = np.zeros((capacity, 1 + len(self.forms)), ALLOCATION)
        self.checksums = np.zeros((capacity, 1 + len(self.forms)), np.uint32)
        self.position = -(-(self.layout.first_row + self.rows.nbytes) // self.PAGE) * self.PAGE
        file.seek(self.position)

    def append(
        self, mode: int, width: int, height: int, data: bytes, label: int, arrays: Sequence[np.ndarray] = ()
    ) -> None:
        """mode 0: `data` is a JPEG file; mode 1: RGB pixels, (height, width, 3) uint8. arrays: as `forms`."""
        places = [self._place(0, data)]
        for number, (form, array) in enumerate(zip(self.forms, arrays, strict=True), 1):
            assert array.shape == form.shape
            places.append(self._place(number, np.ascontiguousarray(array, form.dtype).tobytes()))
        self.rows[self.samples] = (mode, width, height, places[0], label, *places[1:])
        self.samples += 1

    def _place(self, number: int, data: bytes) -> int:
        """Writes the bytes of the sample's image, number 0, or of one of its arrays. Returns where they begin."""
        assert 0 < len(data) <= self.PAGE
        if self.position % self.PAGE + len(data) > self.PAGE:
            self.position = -(-self.position // self.PAGE) * self.PAGE
            self.file.seek(self.position)
        self.file.write(data)
        self.table[self.samples, number] = (self.samples, self.position, len(data))
        self.checksums[self.samples, number] = self.crc32c(np.frombuffer(data, np.uint8))
        self.position += len(data)
        return self.position - len(data)

    def columns(self, first: int) -> list[bytes]:
        """Rows, table and checksums of the samples from `first` on, for restore."""
        return [array[first : self.samples].tobytes() for array in (self.rows, self.table, self.checksums)]

    def restore(self, columns: Sequence[bytes], position: int) -> None:
        """Takes over samples that stand in the file already, behind those it has. columns: theirs; position: where the
        next one goes."""
        arrays = (self.rows, self.table, self.checksums)
        more = len(columns[0]) // self.rows.itemsize
        for array, data in zip(arrays, columns, strict=True):
            part = array[self.samples : self.samples + more]
            part[...] = np.frombuffer(data, array.dtype).reshape(part.shape)
        self.samples, self.position = self.samples + more, position

    def is_whole(self) -> bool:
        """Whether the file holds the bytes of all samples, by their checksums. It is open at no certain place."""
        places = self.table[: self.samples].reshape(-1)
        for (_, start, size), expected in zip(places, self.checksums[: self.samples].reshape(-1), strict=True):
            self.file.seek(int(start))
            data = self.file.read(int(size))
            if len(data) < size or self.crc32c(np.frombuffer(data, np.uint8)) != expected:
                return False
        return True

    def labels(self) -> NDArray[np.int64]:
        """(samples,)"""
        return self.rows["label"][: self.samples].astype(np.int64)

    def finish(self) -> dict[str, Any]:
        """Writes table, rows, fields and header; returns what the note, a BetonInfo, says of them."""
        # Views, not copies: ten million samples have half a gigabyte of rows and table.
        table, rows = (array[: self.samples].reshape(-1).view(np.uint8).data for array in (self.table, self.rows))
        header = np.array([(VERSION, len(self.fields), self.PAGE, self.samples, self.position)], HEADER)
        start = header.tobytes() + descriptors(self.fields, self.forms).tobytes()
        checksums = [encode_checksums(column) for column in self.checksums[: self.samples].T]
        fields = [
            FieldNote(name=name, dtype=dtype.name, shape=shape, offset=self.offsets[name], crc32c=text)
            for (name, dtype, shape), text in zip(self.forms, checksums[1:], strict=True)
        ]
        self.file.write(table)
        self.file.seek(0)
        self.file.write(start)
        self.file.write(rows)
        self.file.flush()
        return {
            "samples": self.samples,
            "bytes": self.position + len(table),
            "alloc_table_ptr": self.position,
            "tables_crc32": zlib.crc32(table, zlib.crc32(rows, zlib.crc32(start))),
            "rows": self.layout,
            "fields": fields,
            "samples_crc32c": checksums[0],
        }


def _row_dtype(sample: np.dtype, offsets: Sequence[int]) -> np.dtype:
    """A row's columns, and then the places of its arrays."""
    columns = sample.fields or {}
    return np.dtype(
        {
            "names": [*columns, *(f"array {number}" for number in range(len(offsets)))],
            "formats": [*(column[0] for column in columns.values()), *["<u8"] * len(offsets)],
            "offsets": [*(int(column[1]) for column in columns.values()), *offsets],
            "itemsize": sample.itemsize,
        }
    )


def write_samples(path: Path, samples: Iterable[tuple[int, int, int, bytes, int]], classes: list[str]) -> BetonInfo:
    """Writes samples, as `Writer.append` takes them, and the note; for benchmarks and tests, which need no safety."""
    samples = list(samples)
    with path.open("wb") as file:
        writer = Writer(file, len(samples))
        for sample in samples:
            writer.append(*sample)
        written = writer.finish()
    info = BetonInfo(classes=classes, sha256=sha256(path), max_side=None, quality=None, skipped=[], **written)
    note_path(path).write_bytes(note_text(info))
    return info
