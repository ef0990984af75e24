"""Journal of a conversion, FILE.beton.tmp: what of the unfinished .beton is written and synced, so that it can go on.

It begins with a line of JSON that says of what the conversion is. A record follows each time that the samples written
so far were synced: a magic number, the length and the CRC-32 of its content. A record that is cut short, as by a kill,
ends what is read.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

_HEAD = struct.Struct("<4sQI")
_MAGIC = b"KBJ1"


@dataclass
class ConversionProgress:
    """How far a conversion is. images: of the source that were looked at; samples: written; position: where the next
    one goes; names_end: the size of the list of names; broken, warned: what was said of images; deep: whether one had
    more than 8 bits."""

    images: int = 0
    samples: int = 0
    position: int = 0
    names_end: int = 0
    broken: list[str] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    deep: bool = False


@dataclass(frozen=True)
class JournalRecord:
    """A step of a conversion. progress: after it, with the messages of this step alone; parts: the columns of the
    samples that were written in it, as Writer.columns has them."""

    progress: ConversionProgress
    parts: list[bytes]


class Journal:
    """Appends to a journal; `open_journal` begins or continues one. key: of what the conversion is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def append(self, record: JournalRecord) -> None:
        """Writes a record, and syncs it. What it tells of has to be synced before."""
        about = {**vars(record.progress), "parts": [len(part) for part in record.parts]}
        content = b"\n".join([json.dumps(about).encode(), b"".join(record.parts)])
        self._file.write(_HEAD.pack(_MAGIC, len(content), zlib.crc32(content)) + content)
        self._sync()

    def restart(self, about: dict[str, Any]) -> None:
        """Empties the journal and writes what the conversion is of."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(about).encode() + b"\n")
        self._sync()

    def read(self) -> Iterator[JournalRecord]:
        """The records that are whole; the file is cut behind the last of them, and written on from there."""
        self._file.seek(0)
        self._file.readline()
        while (record := self._record(end := self._file.tell())) is not None:
            yield record
        self._file.seek(end)
        self._file.truncate()

    def about(self) -> dict[str, Any] | None:
        """What the conversion is of; None: the file is no journal."""
        self._file.seek(0)
        try:
            found = json.loads(self._file.readline())
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def close(self) -> None:
        self._file.close()

    def _record(self, _at: int) -> JournalRecord | None:
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        magic, length, crc = _HEAD.unpack(head)
        left = os.fstat(self._file.fileno()).st_size - self._file.tell()
        if magic != _MAGIC or length > left:
            return None
        content = self._file.read(length)
        if zlib.crc32(content) != crc:
            return None
        line, _, rest = content.partition(b"\n")
        about = json.loads(line)
        parts: list[bytes] = []
        for size in about.pop("parts"):
            parts.append(rest[:size])
            rest = rest[size:]
        return JournalRecord(ConversionProgress(**about), parts)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".tmp")


def open_journal(out: Path) -> Journal:
    """Opens the journal of a conversion to `out`, or makes an empty file for it."""
    return Journal(os.fdopen(os.open(journal_path(out), os.O_RDWR | os.O_CREAT, 0o666), "r+b"))
