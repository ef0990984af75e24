"""The writer of .beton files."""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kilobatch.data.beton_layout import ALLOCATION, HEADER, OWN_FIELDS, OWN_LAYOUT, SAMPLE, VERSION, descriptors
from kilobatch.data.beton_note import BetonInfo, encode_checksums, note_path, note_text
from kilobatch.data.files import sha256


class Writer:
    """Writes samples in order to a file that is open at its start; `finish` makes it a .beton.

    The header is written last: until then the file begins with zeros. `capacity`: the largest number of samples.
    """

    PAGE = 1 << 23  # bytes, FFCV's default; no sample crosses the edge of a page, so none may be larger

    def __init__(self, file: BinaryIO, capacity: int):
        from kilobatch.data.crc32c import crc32c  # numba: a command that only knows PAGE does without

        self.crc32c = crc32c
        self.file = file
        self.samples = 0
        self.rows = np.zeros(capacity, SAMPLE)
        self.table = np.zeros(capacity, ALLOCATION)
        self.checksums = np.zeros(capacity, np.uint32)
        self.position = -(-(OWN_LAYOUT.first_row + self.rows.nbytes) // self.PAGE) * self.PAGE
        file.seek(self.position)

    def append(self, mode: int, width: int, height: int, data: bytes, label: int) -> None:
        """mode 0: `data` is a JPEG file; mode 1: RGB pixels, (height, width, 3) uint8."""
        assert 0 < len(data) <= self.PAGE
        if self.position % self.PAGE + len(data) > self.PAGE:
            self.position = -(-self.position // self.PAGE) * self.PAGE
            self.file.seek(self.position)
        self.file.write(data)
        self.rows[self.samples] = (mode, width, height, self.position, label)
        self.table[self.samples] = (self.samples, self.position, len(data))
        self.checksums[self.samples] = self.crc32c(np.frombuffer(data, np.uint8))
        self.samples += 1
        self.position += len(data)

    def finish(self) -> dict[str, Any]:
        """Writes table, rows, fields and header; returns what the note, a BetonInfo, says of them."""
        table = self.table[: self.samples].tobytes()
        header = np.array([(VERSION, len(OWN_FIELDS), self.PAGE, self.samples, self.position)], HEADER)
        start = header.tobytes() + descriptors(OWN_FIELDS).tobytes() + self.rows[: self.samples].tobytes()
        self.file.write(table)
        self.file.seek(0)
        self.file.write(start)
        self.file.flush()
        return {
            "samples": self.samples,
            "bytes": self.position + len(table),
            "alloc_table_ptr": self.position,
            "tables_crc32": zlib.crc32(table, zlib.crc32(start)),
            "samples_crc32c": encode_checksums(self.checksums[: self.samples]),
        }


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
