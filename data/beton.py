"""Checks that a .beton file is whole, and reads its labels and the names of its images.

FFCV reads some damaged files without an error, and then shows constant images or other labels. So each .beton has a
note beside it, `FILE.json`, with checksums of all that is read from the file; `convert` writes it after the file was
synced, and `convert --adopt` for a file that FFCV wrote. A file whose note is missing or does not agree with it is
refused. What is checked when:

| part of the file | checksum in the note | checked |
|---|---|---|
| header, field descriptors, rows, allocation table | CRC-32 | at every start, and of the copy that FFCV has read |
| each sample's bytes, and those of its fields | CRC-32C | each time that it is decoded |
| `FILE.names` | SHA-256 | when names are read |
| the whole file | SHA-256 | by `convert --verify` |
| the note itself | CRC-32, in its first line | when it is read |
"""

import hashlib
import time
import zlib
from functools import lru_cache, reduce
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton_layout import ALLOCATION, HEADER, SMALLEST_PAGE, VERSION, allocation_of
from kilobatch.data.beton_note import (
    BetonInfo,
    FieldNote,
    decode_checksums,
    names_path,
    note_path,
    read_note,
    sample_checksums,
)
from kilobatch.data.errors import UserError, did_you_mean

SETTLED = 2_000_000_000  # ns: what was written later than this ago may change again and keep its time stamps


class Tables(NamedTuple):
    """What describes the samples. start: header, field descriptors and rows; allocation: the rest after the samples."""

    start: bytes
    allocation: bytes


def checksum(file: BufferedReader | BufferedRandom) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def verify_beton(path: Path, full: bool = False) -> BetonInfo:
    """Checks that a .beton is whole, and returns its note.

    The quick check compares the file's size and its tables' checksum with the note beside it: 80 ms for a million
    samples, and 0.2 ms for a file that this process has checked and that has not changed since. `full` also reads
    the samples and the names. Raises UserError, which says what is wrong.
    """
    path = path.absolute()
    identity = _identity(path)
    info = _check_identical(path, identity) if identity is not None else _check_tables(path)[0]
    if full:
        _check_samples(path, info)
        if info.names_sha256 is not None:
            read_names(path)
    return info


def read_labels(path: Path) -> NDArray[np.int64]:
    """Reads the labels of a .beton, (samples,). Raises UserError as verify_beton does."""
    return _read_rows(path)["label"].astype(np.int64)


def read_short_sides(path: Path) -> NDArray[np.int64]:
    """Reads the shorter side of each image of a .beton in pixels, (samples,). Raises UserError as verify_beton does."""
    rows = _read_rows(path)
    return np.minimum(rows["width"], rows["height"]).astype(np.int64)


def read_jpeg_pixels(path: Path) -> float:
    """Pixels of an image of a .beton in the mean; one that is stored as it is counts as none. Raises UserError as
    verify_beton does."""
    rows = _read_rows(path)
    return float((rows["width"].astype(np.int64) * rows["height"] * (rows["mode"] == 0)).mean())  # mode 0: a JPEG


def _read_rows(path: Path) -> np.ndarray:
    info, tables = _check_tables(path)
    return np.frombuffer(tables.start, info.rows.dtype(), info.samples, info.rows.first_row)


def read_fingerprints(path: Path) -> NDArray[np.uint64]:
    """The CRC-32C and the size of each sample's bytes as one number, (samples,): two samples of one number hold one
    image. Raises UserError as verify_beton does."""
    info, tables = _check_tables(path)
    return sample_checksums(info).astype(np.uint64) << np.uint64(32) | _samples_of(info, tables)[1].astype(np.uint64)


def find_field(path: Path, info: BetonInfo, name: str) -> FieldNote:
    """The note's description of a field beside image and label. Raises UserError where there is none."""
    found = next((field for field in info.fields if field.name == name), None)
    if found is None:
        others = ", ".join(field.name for field in info.fields) or "none"
        raise UserError(
            f"{path} has no field '{name}' beside image and label (it has: {others}); convert a source that has it, "
            f"such as npz:FILE with an array '{name}', a row for each image"
        )
    return found


def read_names(path: Path) -> list[str]:
    """Reads the names of a .beton's images: paths within the folder that it was made from.

    Raises UserError where the images have no names, or where FILE.names was not written together with this .beton.
    """
    info = verify_beton(path)
    if info.names_sha256 is None:
        raise UserError(
            f"{path} does not know the names of its images: it was made from a source without any, by FFCV's own "
            "writer, or before names were kept; convert their folder: kilobatch convert folder:PATH FILE.beton"
        )
    return checked_names(path, info.names_sha256)


def checked_names(path: Path, expected: str) -> list[str]:
    """Reads FILE.names. Raises UserError where its SHA-256 is another."""
    names = names_path(path)
    again = f"convert the folder again, or copy {names.name} together with {path.name}"
    try:
        data = names.read_bytes()
    except OSError as error:
        raise UserError(f"{names} cannot be read: {error.strerror}; {again}") from None
    if hashlib.sha256(data).hexdigest() != expected:
        raise UserError(f"{names} is not the one that was written with {path.name}: its SHA-256 differs; {again}")
    return data.decode().split("\n")[:-1]


def describe_sample(path: Path, info: BetonInfo, sample: int) -> str:
    """A sample's number and, where it is known, its image's name, for messages."""
    names = names_path(path)
    data = names.read_bytes() if info.names_sha256 is not None and names.is_file() else b""
    if hashlib.sha256(data).hexdigest() != info.names_sha256:  # a message about damage must not fail by other damage
        return f"sample {sample}"
    name = data.decode().split("\n")[sample]
    return f"sample {sample} ({name})"


def refuse_changed(path: Path, info: BetonInfo, *tables: bytes | memoryview) -> None:
    """Raises UserError where the tables, in the file's order, are not those that the note was written for."""
    if tables_crc32(*tables) != info.tables_crc32:
        raise UserError(
            f"{path} is damaged: its header, fields, rows or allocation table have changed (their CRC-32 differs); "
            f"{_again(path)}"
        )


def tables_crc32(*tables: bytes | memoryview) -> int:
    return reduce(lambda crc, part: zlib.crc32(part, crc), tables, 0)


def read_header(path: Path) -> np.void:
    """Reads the header of a file that looks like a .beton. Raises UserError for one that does not."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a .beton; a folder of images is given as folder:{path}")
    try:
        with path.open("rb") as file:
            start = file.read(4096)
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
    if page_size < SMALLEST_PAGE or page_size & (page_size - 1):
        raise UserError(f"{path} is not a .beton: it does not begin with FFCV's header; {make}")
    if header["version"] != VERSION:
        raise UserError(f"{path} is a .beton of FFCV version {header['version']}, this reads version {VERSION}; {make}")
    return header


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when the file or its note does; None: they are absent, or so new that it might not change."""
    try:
        stats = [file.stat() for file in (path, note_path(path))]
    except OSError:
        return None
    if max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats) > time.time_ns() - SETTLED:
        return None
    return tuple(
        part for stat in stats for part in (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    )


@lru_cache(maxsize=64)
def _check_identical(path: Path, identity: tuple[int, ...]) -> BetonInfo:
    return _check_tables(path)[0]


def _check_tables(path: Path) -> tuple[BetonInfo, Tables]:
    """The quick check. Returns the note, and the tables as they were checked."""
    header = read_header(path)
    info = read_note(path)
    note, again = note_path(path).name, _again(path)
    size = path.stat().st_size
    if size != info.bytes:
        what = "is cut short" if size < info.bytes else "is not the file that was converted"
        raise UserError(f"{path} {what}: it has {size:,} bytes, {note} says {info.bytes:,}; {again}")
    if header["num_samples"] != info.samples:
        raise UserError(
            f"{path}: its header counts {header['num_samples']:,} samples, {note} says {info.samples:,}; {again}"
        )
    if header["alloc_table_ptr"] != info.alloc_table_ptr:
        raise UserError(f"{path} is damaged: its header does not point to its allocation table; {again}")
    tables = read_tables(path, info.rows.first_row + info.samples * info.rows.bytes, info.alloc_table_ptr)
    refuse_changed(path, info, *tables)
    return info, tables


def read_tables(path: Path, end_of_rows: int, alloc_table_ptr: int) -> Tables:
    """Reads what stands before the samples, and behind them. Raises UserError."""
    try:
        with path.open("rb") as file:
            start = file.read(end_of_rows)
            file.seek(alloc_table_ptr)
            return Tables(start, file.read())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions and its disk") from error


def _check_samples(path: Path, info: BetonInfo) -> None:
    """Compares the whole file with its SHA-256. Raises UserError, which names the samples that have changed."""
    with path.open("rb") as file:
        found = checksum(file)
    if found == info.sha256:
        return
    from kilobatch.data.crc32c import crc32c  # compiled code, which takes a second to load

    tables, data = _check_tables(path)[1], np.memmap(path, np.uint8, "r")
    parts = [(*_samples_of(info, tables), sample_checksums(info))]
    for field in info.fields:
        starts = _column(info, tables, field.offset)
        parts.append((starts, np.full(len(starts), field.form.bytes, np.uint64), decode_checksums(field.crc32c)))
    changed = sorted(
        {
            i
            for starts, sizes, expected in parts
            for i, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True))
            if crc32c(np.asarray(data[start : start + size])) != expected[i]
        }
    )
    shown = ", ".join(describe_sample(path, info, i) for i in changed[:20])
    more = f" and {len(changed) - 20:,} more" if len(changed) > 20 else ""
    what = f"{len(changed):,} of its {info.samples:,} samples have changed: {shown}{more}"
    raise UserError(
        f"{path} is damaged: its SHA-256 is {found[:16]}…, should be {info.sha256[:16]}…; "
        f"{what if changed else 'all samples are whole, bytes between them have changed'}; {_again(path)}"
    )


def _samples_of(info: BetonInfo, tables: Tables) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Where each sample's bytes begin in the file, and how many they are, (samples,) each."""
    starts = np.frombuffer(tables.start, info.rows.dtype(), info.samples, info.rows.first_row)["data_ptr"]
    allocation = np.frombuffer(tables.allocation, ALLOCATION)
    return starts, allocation["size"][allocation_of(starts, allocation["ptr"], allocation["size"])]


def _column(info: BetonInfo, tables: Tables, offset: int) -> NDArray[np.uint64]:
    """The places of a field's arrays, (samples,)."""
    column = np.dtype({"names": ["ptr"], "formats": ["<u8"], "offsets": [offset], "itemsize": info.rows.bytes})
    return np.frombuffer(tables.start, column, info.samples, info.rows.first_row)["ptr"]


def _again(path: Path) -> str:
    return f"convert it again, or copy it again together with {note_path(path).name}"
