"""The .beton file: FFCV's layout (version 2), and the checks that a file is whole.

    header | two field descriptors | one row per sample | samples, none across a page's edge | allocation table

FFCV reads some damaged files without an error and then shows constant images. So each .beton that is converted here
gets a note, `FILE.json` beside it, which is written after the file was synced; a file whose note is missing or does not
agree with it is refused. FFCV's layout is repeated here so that checking a file imports neither FFCV nor numba.
"""

import hashlib
import json
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.data.files import first_problem

NOTE_FORMAT = 1
VERSION = 2
FIELDS = ((2, b"image"), (1, b"label"))  # (FFCV's type id, name): RGBImageField, IntField

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
SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "data_ptr", "label"],
        "formats": ["<u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])


class BetonInfo(BaseModel):
    """The note beside a .beton: its size in bytes, its checksum, and a description of its samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = NOTE_FORMAT
    samples: int
    classes: list[str]
    bytes: int
    sha256: str
    alloc_table_ptr: int
    max_side: int | None
    quality: int
    skipped: list[str]
    names_sha256: str | None = None  # of FILE.names, the list of the images' names; None: they have no names


def note_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


def names_path(beton: Path) -> Path:
    return beton.with_name(beton.name + ".names")


def fields() -> np.ndarray:
    """The two field descriptors, as FFCV writes them: (2,) of FIELD."""
    descriptors = np.zeros(len(FIELDS), FIELD)
    for row, (type_id, name) in zip(descriptors, FIELDS, strict=True):
        row["type_id"] = type_id
        row["name"][: len(name)] = np.frombuffer(name, "<u1")
    return descriptors


def checksum(file: BufferedReader | BufferedRandom) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def verify_beton(path: Path, full: bool = False) -> BetonInfo:
    """Checks that a .beton is whole, and returns its note.

    The quick check compares name, size, header, fields and count with the note beside the file, and takes well under a
    millisecond; `full` also reads the file and compares its SHA-256. Raises UserError, which says what is wrong.
    """
    header = _header(path)
    info = _note(path)
    size = path.stat().st_size
    again = f"convert it again, or copy it again together with {note_path(path).name}"
    if size != info.bytes:
        what = "is cut short" if size < info.bytes else "is not the file that was converted"
        raise UserError(f"{path} {what}: it has {size:,} bytes, {note_path(path).name} says {info.bytes:,}; {again}")
    if header["num_samples"] != info.samples:
        raise UserError(
            f"{path}: its header counts {header['num_samples']:,} samples, "
            f"{note_path(path).name} says {info.samples:,}; {again}"
        )
    if header["alloc_table_ptr"] != info.alloc_table_ptr:
        raise UserError(f"{path} is damaged: its header does not point to its allocation table; {again}")
    if full:
        with path.open("rb") as file:
            found = checksum(file)
        if found != info.sha256:
            raise UserError(f"{path} is damaged: its SHA-256 is {found[:16]}…, should be {info.sha256[:16]}…; {again}")
        if info.names_sha256 is not None:
            read_names(path)
    return info


def read_labels(path: Path) -> NDArray[np.int64]:
    """Reads the labels of a .beton, (samples,). Raises UserError as verify_beton does."""
    samples = verify_beton(path).samples
    rows = np.fromfile(path, SAMPLE, samples, offset=HEADER.itemsize + len(FIELDS) * FIELD.itemsize)
    return rows["label"].astype(np.int64)


def read_names(path: Path) -> list[str]:
    """Reads the names of a .beton's images: paths within the folder that it was made from.

    Raises UserError where the images have no names, or where FILE.names was not written together with this .beton.
    """
    info, names = verify_beton(path), names_path(path)
    if info.names_sha256 is None:
        raise UserError(
            f"{path} does not know the names of its images: it was made from a source without any, or before names "
            f"were kept; convert the folder again: kilobatch convert folder:PATH {path}"
        )
    again = f"convert the folder again, or copy {names.name} together with {path.name}"
    try:
        data = names.read_bytes()
    except OSError as error:
        raise UserError(f"{names} cannot be read: {error.strerror}; {again}") from None
    if hashlib.sha256(data).hexdigest() != info.names_sha256:
        raise UserError(f"{names} is not the one that was written with {path.name}: its SHA-256 differs; {again}")
    return data.decode().split("\n")[:-1]


def _header(path: Path) -> np.void:
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a .beton; a folder of images is given as folder:{path}")
    try:
        with path.open("rb") as file:
            start = file.read(HEADER.itemsize + len(FIELDS) * FIELD.itemsize)
    except FileNotFoundError:
        betons = [p.name for p in path.parent.glob("*.beton")]
        near = did_you_mean(path.name, betons) if betons else f"; make it with: kilobatch convert SOURCE {path}"
        raise UserError(f"{path} does not exist{near}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions and its disk") from error
    make = f"make one with: kilobatch convert SOURCE {path.stem}.beton"
    if not start:
        raise UserError(f"{path} is empty, not a .beton; {make}")
    if len(start) < HEADER.itemsize:
        raise UserError(f"{path} is not a .beton: it has {len(start)} bytes, fewer than a header; {make}")
    header = np.frombuffer(start, HEADER, 1)[0]
    if start.count(0) == len(start):
        raise UserError(f"{path} was never finished: its header is blank; {make}")
    page_size = int(header["page_size"])
    if page_size < 1 << 21 or page_size & (page_size - 1):
        raise UserError(f"{path} is not a .beton: it does not begin with FFCV's header; {make}")
    if header["version"] != VERSION:
        raise UserError(f"{path} is a .beton of FFCV version {header['version']}, this reads version {VERSION}; {make}")
    if header["num_fields"] != len(FIELDS) or start[HEADER.itemsize :] != fields().tobytes():
        raise UserError(f"{path} is a .beton with other fields than (image: RGBImageField, label: IntField); {make}")
    return header


def _note(path: Path) -> BetonInfo:
    note = note_path(path)
    make = "convert it with: kilobatch convert"
    try:
        content = json.loads(note.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path} has no {note.name} beside it: its conversion was cut off, it was copied alone, or another "
            f"program wrote it; {make}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{note} is damaged: it is not JSON; {make} again") from None
    except OSError as error:
        raise UserError(f"{note} cannot be read: {error.strerror}; check its permissions and its disk") from error
    version = content.get("format") if isinstance(content, dict) else None
    if version != NOTE_FORMAT:
        raise UserError(f"{note} has format {version!r}, this reads format {NOTE_FORMAT}; {make} again")
    try:
        return BetonInfo.model_validate(content)
    except ValidationError as error:
        key, problem = first_problem(error)
        raise UserError(f"{note} is damaged: {key}: {problem.lower()}; {make} again") from None


class Writer:
    """Writes samples in order to a file that is open at its start; `finish` makes it a .beton.

    The header is written last: until then the file begins with zeros. `capacity`: the largest number of samples.
    """

    PAGE = 1 << 23  # bytes, FFCV's default; no sample crosses the edge of a page, so none may be larger

    def __init__(self, file: BinaryIO, capacity: int):
        self.file = file
        self.samples = 0
        self.rows = np.zeros(capacity, SAMPLE)
        self.table = np.zeros(capacity, ALLOCATION)
        start = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + self.rows.nbytes
        self.position = -(-start // self.PAGE) * self.PAGE
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
        self.samples += 1
        self.position += len(data)

    def finish(self) -> int:
        """Writes table, rows, fields and header; returns the position of the allocation table."""
        self.file.write(self.table[: self.samples].tobytes())
        header = np.array([(VERSION, len(FIELDS), self.PAGE, self.samples, self.position)], HEADER)
        self.file.seek(0)
        self.file.write(header.tobytes() + fields().tobytes() + self.rows[: self.samples].tobytes())
        self.file.flush()
        return self.position
