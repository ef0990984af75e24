"""Adopts .beton files that have no note of today's: those that FFCV wrote elsewhere, and those of an older kilobatch.

Every sample is checked once, and the note is written beside the file, which itself stays as it is.
"""

import os
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton import Tables, checked_names, checksum, read_header, read_tables, tables_crc32
from kilobatch.data.beton_layout import ALLOCATION, RowLayout, allocation_of
from kilobatch.data.beton_note import (
    OLD_FORMAT,
    BetonInfo,
    OldInfo,
    encode_checksums,
    note_bytes,
    note_format,
    note_path,
    note_text,
)
from kilobatch.data.crc32c import crc32c
from kilobatch.data.errors import UserError
from kilobatch.data.files import parse_model, write_whole
from kilobatch.data.sources.beton_fields import read_layout
from kilobatch.data.sources.image_files import BrokenImage, read_image
from kilobatch.data.sources.path_names import composed
from kilobatch.data.sources.specs import BETON_SUFFIXES
from kilobatch.data.sources.turbojpeg import judge_jpeg

JPEG, RAW = 0, 1  # RGBImageField's modes
TASK_SAMPLES = 64  # samples in one task of a thread
MOST_CLASSES = 1_000_000  # that are named by their numbers: a label above is damaged, or no class
SHOWN = 20  # broken samples in a message


class StoredImages(NamedTuple):
    """The images of a .beton. storage: the mapped file; the others: (samples,)."""

    storage: NDArray[np.uint8]
    start: NDArray[np.int64]
    size: NDArray[np.int64]
    mode: NDArray[np.uint8]
    width: NDArray[np.int64]
    height: NDArray[np.int64]


class SampleVerdict(NamedTuple):
    """checksum: CRC-32C; broken: why the image cannot be used; warned: libjpeg's warning about data it decodes."""

    checksum: int
    broken: str | None = None
    warned: str | None = None


def adopt(
    beton: Path,
    *,
    classes: Path | None = None,
    label: str | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> BetonInfo:
    """Checks each sample of `beton` and writes its note.

    classes: a text file with the name of a class in each line (None: 0, 1, …); label: the field with the labels, where
    there are several. A file with the note of an older kilobatch has to have the SHA-256 of that note, whose classes
    and names it keeps. Raises UserError where a sample is broken, after checking all; no note is written then.
    """
    header, before, old = read_header(beton), _state(beton), _old_note(beton)
    _refuse_other_suffix(beton)
    if old is not None and (classes, label) != (None, None):
        leave = "leave out --class-names and --label-field"
        raise UserError(f"{note_path(beton)} has the names of the classes already; {leave}")
    layout, tables = _read(beton, header, label)
    rows = np.frombuffer(tables.start, layout.dtype(), offset=layout.first_row)
    if progress:
        print(f"checking {len(rows):,} samples of {beton}", file=sys.stderr, flush=True)
    with beton.open("rb") as file:
        sha256 = checksum(file)
    if old is not None:
        _compare(beton, old, sha256)
    names = old.classes if old is not None else _class_names(classes, int(rows["label"].max()))
    verdicts = _judge_samples(beton, rows, tables, len(names), threads)
    warned = _refuse_broken(beton, verdicts, warnings_too=old is None)
    if _state(beton) != before:
        raise UserError(f"{beton} has changed while it was checked; adopt it when no program writes to it")
    size = beton.stat().st_size
    info = BetonInfo(
        samples=len(rows),
        classes=names,
        bytes=size,
        sha256=sha256,
        rows=layout,
        alloc_table_ptr=size - len(tables.allocation),
        tables_crc32=tables_crc32(*tables),
        max_side=old and old.max_side,
        quality=old and old.quality,
        skipped=old.skipped if old is not None else [],
        warned=warned,
        names_sha256=old and old.names_sha256,
        samples_crc32c=encode_checksums(np.array([verdict.checksum for verdict in verdicts], np.uint32)),
    )
    try:
        write_whole(note_path(beton), [note_text(info)])
    except OSError as error:
        raise UserError(
            f"{note_path(beton)} cannot be written: {error.strerror}; the note has to stand beside the file: make "
            "room, or move the file to where one may write"
        ) from error
    return info


def _refuse_other_suffix(beton: Path) -> None:
    """Raises UserError for a name that no recipe could give."""
    if beton.suffix not in BETON_SUFFIXES:
        raise UserError(
            f"{beton} does not end in {' or '.join(BETON_SUFFIXES)}, by which recipes know such files; rename it, or "
            f"adopt a link to it, made in its folder by: ln -s {shlex.quote(beton.name)} "
            f"{shlex.quote(beton.name + '.beton')}"
        )


def _read(beton: Path, header: np.void, label: str | None) -> tuple[RowLayout, Tables]:
    layout = read_layout(beton, header, label)
    samples, alloc_table_ptr = int(header["num_samples"]), int(header["alloc_table_ptr"])
    end_of_rows, size = layout.first_row + samples * layout.bytes, beton.stat().st_size
    if not (samples and end_of_rows <= alloc_table_ptr <= size) or (size - alloc_table_ptr) % ALLOCATION.itemsize:
        raise UserError(
            f"{beton} was never finished, or is cut short: by its header it has {samples:,} samples and a table at "
            f"byte {alloc_table_ptr:,}, of {size:,} bytes; write or copy it again"
        )
    return layout, read_tables(beton, end_of_rows, alloc_table_ptr)


def _state(beton: Path) -> tuple[int, ...]:
    stat = beton.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _old_note(beton: Path) -> OldInfo | None:
    note, data = note_path(beton), note_bytes(beton)
    if data is None:
        return None
    if note_format(data) != OLD_FORMAT:
        raise UserError(
            f"{beton} has a note already, {note.name}; check the file with: kilobatch convert --verify {beton}. To "
            f"adopt it anew, remove {note.name} first; the names of its classes then come from --class-names"
        )
    return parse_model(data, note, OldInfo, "copy it again, or convert again", with_key=True)


def _compare(beton: Path, old: OldInfo, sha256: str) -> None:
    """Refuses a file that is not the one of the older note."""
    if sha256 != old.sha256:
        raise UserError(
            f"{beton} is damaged, or not the file of {note_path(beton).name}: its SHA-256 is {sha256[:16]}…, should be "
            f"{old.sha256[:16]}…; convert again, or copy both again"
        )
    if old.names_sha256 is not None:
        checked_names(beton, old.names_sha256)


def _class_names(file: Path | None, highest: int) -> list[str]:
    """The names in the file, or numbers up to the highest label."""
    if file is None:
        return [str(label) for label in range(min(max(highest, 0) + 1, MOST_CLASSES))]
    try:
        names = [composed(line.strip()) for line in file.read_text("utf-8-sig").rstrip().split("\n")]
    except OSError as error:
        raise UserError(f"--class-names {file} cannot be read: {error.strerror}; name a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"--class-names {file} is not a text file; write the name of a class in each line") from None
    if "" in names:
        raise UserError(f"--class-names {file}: line {names.index('') + 1} is empty; write the name of a class in each")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"--class-names {file} names '{twice}' twice; each class needs a name of its own")
    return names


def _judge_samples(
    beton: Path, rows: np.ndarray, tables: Tables, classes: int, threads: int | None
) -> list[SampleVerdict]:
    """Checks each sample's place, size and label, and decodes those that pass."""
    storage = np.asarray(np.memmap(beton, np.uint8, "r"))
    allocation = np.frombuffer(tables.allocation, ALLOCATION)
    number = allocation_of(rows["data_ptr"], allocation["ptr"], allocation["size"])
    placed = np.append(allocation, np.zeros(1, ALLOCATION))[number]  # -1: the one of size 0
    images = StoredImages(
        storage,
        rows["data_ptr"].astype(np.int64),
        placed["size"].astype(np.int64),
        *(rows["mode"], rows["width"].astype(np.int64), rows["height"].astype(np.int64)),
    )
    end_of_data = len(storage) - len(tables.allocation)
    problems = _wrong_rows(images, placed["sample_id"], len(tables.start), end_of_data)
    for i in np.flatnonzero((rows["label"] < 0) | (rows["label"] >= classes)).tolist():
        problems.setdefault(i, f"its label is {rows['label'][i]:,}; labels are from 0 to {classes - 1:,}")

    def judge(start: int) -> list[SampleVerdict]:
        part = range(start, min(start + TASK_SAMPLES, len(rows)))
        return [SampleVerdict(0, problems[i]) if i in problems else _judge(images, i) for i in part]

    crc32c(storage[:0])  # numba's first call is not safe in several threads at once
    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        return [verdict for part in pool.map(judge, range(0, len(rows), TASK_SAMPLES)) for verdict in part]


def _wrong_rows(images: StoredImages, owner: NDArray[np.uint64], first: int, last: int) -> dict[int, str]:
    """Why samples whose rows are wrong are. owner: the sample of each image's allocation; first, last: where samples
    may begin and end."""
    samples = np.arange(len(owner))
    start, size, pixels = images.start, images.size, 3 * images.width * images.height
    placed = (size > 0) & (start >= first) & (start <= last) & (size <= last - start)
    order = np.lexsort((size, start))
    reached = np.maximum.accumulate(np.where(placed, start + size, 0)[order])
    overlapping = np.zeros(len(samples), bool)
    overlapping[order[1:]] = reached[:-1] > start[order[1:]]
    reasons: list[tuple[NDArray[np.bool_], Callable[[int], str]]] = [
        (~placed, lambda i: f"its place, byte {start[i]:,}, is not one of the file's allocations"),
        (owner != samples, lambda i: f"its place, byte {start[i]:,}, belongs to sample {owner[i]:,}"),
        (overlapping, lambda i: "its bytes overlap those of another sample"),
        (images.mode > RAW, lambda i: f"its mode is {images.mode[i]}; known: 0 (JPEG), 1 (pixels)"),
        (pixels == 0, lambda i: f"it has {images.width[i]} x {images.height[i]} pixels"),
        ((images.mode == RAW) & (size != pixels), lambda i: f"it has {size[i]:,} bytes for {pixels[i]:,} values"),
    ]
    problems: dict[int, str] = {}
    for wrong, describe in reasons:
        for i in np.flatnonzero(wrong).tolist():
            problems.setdefault(i, describe(i))
    return problems


def _judge(images: StoredImages, i: int) -> SampleVerdict:
    """Decodes an image."""
    data = images.storage[images.start[i] : images.start[i] + images.size[i]]
    verdict = partial(SampleVerdict, int(crc32c(data)))
    if images.mode[i] == RAW:
        return verdict()
    found = judge_jpeg(data)
    size = found.width, found.height
    if found.problem is not None and found.fatal:  # libjpeg-turbo lacks some of libjpeg's formats, such as CMYK
        try:
            size = read_image(data.tobytes(), "JPEG").shape[1::-1]
        except BrokenImage:
            return verdict(broken=found.problem)
    if size != (images.width[i], images.height[i]):
        described = f"{images.width[i]} x {images.height[i]}"
        return verdict(broken=f"its JPEG has {size[0]} x {size[1]} pixels, its row says {described}")
    return verdict(warned=None if found.fatal else found.problem)


def _refuse_broken(beton: Path, verdicts: list[SampleVerdict], warnings_too: bool) -> list[str]:
    """Raises UserError that names the broken samples. Returns the warnings."""
    warned = [f"sample {i}: {verdict.warned}" for i, verdict in enumerate(verdicts) if verdict.warned]
    broken = [
        f"sample {i}: {reason}"
        for i, verdict in enumerate(verdicts)
        if (reason := verdict.broken or (verdict.warned if warnings_too else None))
    ]
    if broken:
        shown = "".join(f"\n  {text}" for text in broken[:SHOWN])
        more = f"\n  and {len(broken) - SHOWN:,} more" if len(broken) > SHOWN else ""
        raise UserError(
            f"{len(broken):,} of the {len(verdicts):,} samples of {beton} are broken; write or copy the file again"
            f"{shown}{more}"
        )
    return warned
