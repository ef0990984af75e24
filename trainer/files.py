"""Files that are whole or absent: synced writes, checksums, and the words for a disk that refuses them."""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kilobatch.data.sync import sync_folder

DESCRIPTION = "checkpoint.json"  # in a checkpoint's folder: what it holds, sealed
CHUNK = 1 << 24  # bytes; hashing and writing alternate on pieces that stay in the processor's cache
Bytes = bytes | memoryview


def is_checkpoint(path: Path) -> bool:
    """Whether it is a checkpoint's own folder, whole or not."""
    return (path / DESCRIPTION).is_file() or (path.is_dir() and path.name.startswith("step-"))


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


def sealed(content: dict[str, Any]) -> bytes:
    """JSON that carries its own checksum; floats come back bit for bit (repr), also inf and nan."""
    return json.dumps({"sha256": _seal(content), "content": content}, indent=1).encode()


def unsealed(text: bytes) -> dict[str, Any]:
    """The content of sealed JSON. Raises ValueError that says what is wrong with it."""
    if not text.strip():
        raise ValueError("it is empty")
    try:
        whole = json.loads(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError alike
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(whole, dict) or whole.keys() != {"sha256", "content"} or not isinstance(whole["content"], dict):
        raise ValueError("it is not a checkpoint's description")
    if whole["sha256"] != _seal(whole["content"]):
        raise ValueError("its checksum does not match its content")
    return whole["content"]


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
