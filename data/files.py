"""Files that are whole or absent: synced writes, checksums, and the words for a disk that refuses them."""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

CHUNK = 1 << 24  # bytes; hashing and writing alternate on pieces that stay in the processor's cache
Bytes = bytes | memoryview


def write_synced(path: Path, parts: Iterable[Bytes]) -> tuple[int, str]:
    """Writes the parts one after another and syncs them to disk; returns size in bytes and SHA-256.

    The checksum is of what was meant, not of what was read back. Both hashing and writing release the interpreter's
    lock, so that a writer thread does not hold up training. Raises OSError; the partial file is removed first, which
    gives a full disk room for the word that says so.
    """
    size, sha = 0, hashlib.sha256()
    try:
        with path.open("wb") as file:
            for part in parts:
                view = memoryview(part)
                for start in range(0, len(view), CHUNK):
                    chunk = view[start : start + CHUNK]
                    sha.update(chunk)
                    file.write(chunk)
                size += len(view)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return size, sha.hexdigest()


def show_whole(path: Path, parts: Iterable[Bytes]) -> None:
    """As write_synced, under a temporary name beside path and then renamed: whoever looks finds path whole, old or
    absent. It touches the folder no more after that, so that whoever waits for path may move the folder away."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    write_synced(beside, parts)
    beside.replace(path)


def write_whole(path: Path, parts: Iterable[Bytes]) -> None:
    """As show_whole, and it lasts: path is whole, old or absent after a power cut, too."""
    show_whole(path, parts)
    sync_folder(path.parent)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(path: Path) -> None:
    """Removes a folder by renaming it first, so that a half-removed one is never taken for a whole one.

    What cannot be removed yet (a reader on a network disk still holds it) stays behind as .trash-… for sweep().
    """
    trash = path.with_name(f".trash-{path.name.lstrip('.')}-{time.time_ns()}")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path) -> None:
    for trash in folder.glob(".trash-*"):
        shutil.rmtree(trash, ignore_errors=True)


def in_words(error: OSError) -> str:
    """What a failed write means to a user, and the way out."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return f"no room left ({error.strerror}); free some, or move the run folder to another disk"
        case errno.EROFS | errno.EACCES | errno.EPERM:
            return f"it may not be written to ({error.strerror}); make it writable, or move the run folder"
        case _:
            return f"{error.strerror or error}; look after the disk, or move the run folder to another one"


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries (creations, renames) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
