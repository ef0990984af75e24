"""The note beside a .beton: what it holds, and the checksums by which damage to the file or to the note is found.

It is JSON. Its first key, `note_crc32`, is the CRC-32 of all bytes after that line, so that no letter of a class's name
can change unseen. Its last, `samples_crc32c`, is long: four bytes for each sample, in base64.
"""

import base64
import json
import zlib
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kilobatch.data.beton_layout import OWN_LAYOUT, ArrayForm, RowLayout
from kilobatch.data.errors import UserError
from kilobatch.data.files import first_problem

NOTE_FORMAT = 2
OLD_FORMAT = 1  # without checksums of tables and samples: `kilobatch convert --adopt` adds them


class FieldNote(BaseModel):
    """An array that each sample has beside image and label.

    dtype: NumPy's name of its type; shape: of one sample's; offset: of its place within a row; crc32c: base64 of the
    CRC-32C of each sample's, little-endian.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    crc32c: str

    @property
    def form(self) -> ArrayForm:
        return ArrayForm(self.name, np.dtype(self.dtype).newbyteorder("<"), self.shape)


class BetonInfo(BaseModel):
    """A .beton's size in bytes, its checksums, and a description of its samples.

    alloc_table_ptr: where its allocation table begins. tables_crc32: of header, field descriptors, rows and allocation
    table, one after another. samples_crc32c: base64 of the samples' CRC-32C, little-endian; see `sample_checksums`.
    max_side, quality: of the conversion; None where it is not known. passed_over: files of the source that are not
    images, by the reason. skipped: broken images that were left out. warned: images that were taken with a warning.
    value_range: what became black and white of images with more than 8 bits. fields: arrays beside image and label.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[2] = NOTE_FORMAT
    samples: int = Field(ge=0)
    classes: list[str]
    bytes: int
    sha256: str
    rows: RowLayout = OWN_LAYOUT
    alloc_table_ptr: int
    tables_crc32: int
    max_side: int | None
    quality: int | None
    passed_over: dict[str, int] = {}
    skipped: list[str]
    warned: list[str] = []
    value_range: tuple[float, float] | None = None
    names_sha256: str | None = None  # of FILE.names, the list of the images' names; None: they have no names
    fields: list[FieldNote] = []
    samples_crc32c: str

    @model_validator(mode="after")
    def _has_all_checksums(self) -> Self:
        letters = -(-4 * self.samples // 3) * 4  # of base64: four for every three bytes
        found = {"samples_crc32c": self.samples_crc32c}
        for name, text in (found | {f"crc32c of {field.name}": field.crc32c for field in self.fields}).items():
            if len(text) != letters:
                raise ValueError(f"{name} has {len(text):,} letters, {letters:,} are for its samples")
        return self


class OldInfo(BaseModel):
    """The note of a .beton as it was written before there were checksums of tables and samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    samples: int
    classes: list[str]
    bytes: int
    sha256: str
    alloc_table_ptr: int
    max_side: int | None
    quality: int
    skipped: list[str]
    names_sha256: str | None = None


def note_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


def names_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".names")


def note_text(info: BetonInfo) -> bytes:
    """The content of the note's file."""
    without = None if info.fields else {"fields"}  # a note of images and labels alone is as it always was
    body = info.model_dump_json(indent=1, exclude=without).removeprefix("{\n").encode() + b"\n"
    return _first_line(body) + body


def encode_checksums(checksums: NDArray[np.uint32]) -> str:
    return base64.b64encode(checksums.astype("<u4").tobytes()).decode()


def decode_checksums(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(base64.b64decode(text), "<u4").astype(np.uint32)


def sample_checksums(info: BetonInfo) -> NDArray[np.uint32]:
    """The CRC-32C of each sample's bytes, (samples,)."""
    return decode_checksums(info.samples_crc32c)


def read_note(beton: Path) -> BetonInfo:
    """Reads the note beside a .beton. Raises UserError where there is none, or none that is whole."""
    note = note_path(beton)
    again = f"convert again, or copy {note.name} again together with {beton.name}"
    data = note_bytes(beton)
    if data is None:
        raise UserError(
            f"{beton} has no {note.name} beside it: its conversion was cut off, it was copied alone, or another "
            f"program wrote it; convert again, copy {note.name} too, or, if FFCV wrote it whole, check it with: "
            f"kilobatch convert --adopt {beton}"
        )
    body = _body(data)
    if body is None:
        if note_format(data) == OLD_FORMAT:
            raise UserError(
                f"{note} has format {OLD_FORMAT}, this reads format {NOTE_FORMAT}, which has a checksum for each "
                f"sample; add them with: kilobatch convert --adopt {beton}"
            )
        raise UserError(f"{note} is damaged: it is not as it was written, its checksum differs; {again}")
    try:
        return BetonInfo.model_validate_json(b"{" + body)
    except ValidationError as error:
        version = note_format(data)
        if version != NOTE_FORMAT:
            raise UserError(
                f"{note} has format {version!r}, this reads format {NOTE_FORMAT}; convert again, or use the kilobatch "
                "that wrote it"
            ) from None
        key, problem = first_problem(error)
        where = f"{key}: " if key else ""  # the checksums' number concerns two keys
        raise UserError(f"{note} is damaged: {where}{problem.lower()}; {again}") from None


def note_bytes(beton: Path) -> bytes | None:
    """The content of the note's file; None: there is none. Raises UserError where it cannot be read."""
    note = note_path(beton)
    try:
        return note.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{note} cannot be read: {error.strerror}; check its permissions and its disk") from error


def note_format(data: bytes) -> object:
    """The number of the note's format; None: the bytes are no note at all."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return content.get("format") if isinstance(content, dict) else None


def _first_line(body: bytes) -> bytes:
    return b'{\n "note_crc32": "%08x",\n' % zlib.crc32(body)


def _body(data: bytes) -> bytes | None:
    """What follows the first line; None if that is not the first line for it."""
    body = data[len(_first_line(b"")) :]
    return body if data == _first_line(body) + body else None
