"""Writes files so that they are whole or absent; checksums, the cache's folder, messages for damaged files."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from kilobatch.data.errors import UserError

CHUNK = 1 << 24  # bytes: hashing and writing alternate on pieces that stay in the processor's cache
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_ITS_PLACE = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)  # a folder, a file, links in a circle
Bytes = bytes | memoryview
T = TypeVar("T")


def write_synced(path: Path, parts: Iterable[Bytes]) -> tuple[int, str]:
    """Writes the parts one after another and syncs them to disk; returns size in bytes and SHA-256.

    The checksum is of the parts as given, not of the file read back. Both hashing and writing release the interpreter's
    lock, so that a writer thread does not hold up training. Raises OSError, after removing the partial file: on a full
    disk that leaves room to record the failure.
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
    """Writes a file as write_synced does, under a temporary name in the same folder, then renames it to path.

    A reader finds the old file, the new one or none, never a part. The folder is not touched after the rename, so that
    a process that waits for path may then move the folder away.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write_synced(temporary, parts)
    temporary.replace(path)


def write_whole(path: Path, parts: Iterable[Bytes]) -> None:
    """Writes a file as show_whole does, and syncs its folder: whole, old or absent after a power cut, too."""
    show_whole(path, parts)
    sync_folder(path.parent)


@contextmanager
def refusing_os_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of writing a file into a UserError that names the file, the cause and the way out."""
    try:
        yield
    except OSError as error:
        raise UserError(refusal_of(error, path)) from error


def write_state(path: Path, content: bytes) -> None:
    """Writes a small file that says how a run stands, as write_whole does.

    On a full disk it replaces the file's content in place, which needs no room below the size of a block, so that the
    run that the disk has ended does not seem to go on; a power cut may then leave a part of it. Raises UserError.
    """
    with refusing_os_errors(path):
        try:
            write_whole(path, [content])
        except OSError as error:
            if not (is_full_disk(error) and path.exists()):
                raise
            with path.open("r+b") as file:
                file.write(content)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())


def refusal_of(error: OSError, path: Path | None = None) -> str:
    """The message for a file that could not be written. path: None: the one that the error names, if any."""
    return f"{path or error.filename or 'a file'} could not be written: {describe_os_error(error)}"


def os_refusal(error: OSError) -> str | None:
    """The message for an error of the operating system that no caller has turned into one; None where it names no file
    and is no full disk, and so is an error of this program."""
    if is_full_disk(error):
        return refusal_of(error)
    return None if error.filename is None else unreadable(Path(os.fsdecode(error.filename)), error)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether the error says that there is no room left, on the disk or within the user's quota."""
    return isinstance(error, OSError) and error.errno in FULL


def describe_bytes(size: int) -> str:
    """A number of bytes in words: in GiB, below one GiB in MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_model(path: Path, model: type[T], way_out: str, *, with_key: bool = False) -> T:
    """Reads a JSON file as a pydantic model, or as any other type that pydantic validates.

    way_out: the end of the message; with_key: whether the message names the key with the wrong value.
    Raises UserError where the file cannot be read or its content is not the model's, and FileNotFoundError.
    """
    return parse_model(read_record(path), path, model, way_out, with_key=with_key)


def read_record(path: Path) -> bytes:
    """The content of a file of a run. Raises UserError where it cannot be read, and FileNotFoundError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(unreadable(path, error)) from error


def unreadable(path: Path, error: OSError) -> str:
    """The message for a file that could not be read, with the cause and the way out."""
    known = error.errno in _IN_ITS_PLACE
    why = describe_os_error(error) if known else f"{error.strerror or error}; make it readable, or put a copy back"
    return f"{path} cannot be read: {why}"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, which says what is wrong with it; also where brackets are nested so
    deep that Python's own reader raises RecursionError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


def parse_model(
    text: str | bytes, path: Path, model: type[T], way_out: str, *, with_key: bool = False, strict: bool | None = None
) -> T:
    """As read_model, for JSON text that was made from the content of `path`. strict: pydantic's."""
    try:
        return TypeAdapter(model).validate_json(text, strict=strict)
    except ValidationError as error:
        key, problem = first_problem(error)
        raise UserError(f"{path} is damaged ({f'{key}: ' if with_key else ''}{problem}); {way_out}") from error


def first_problem(error: ValidationError) -> tuple[str, str]:
    """The dotted key of the first value that pydantic found wrong, "" for the whole, and what is wrong with it."""
    first = error.errors()[0]
    return ".".join(map(str, first["loc"])), first["msg"]


def cache_root() -> Path:
    """The folder for converted images and compiled loops: KILOBATCH_CACHE, else ~/.cache/kilobatch."""
    return Path(os.environ.get("KILOBATCH_CACHE") or Path.home() / ".cache" / "kilobatch").expanduser()


def lock_file(file: IO[Any], *, wait: bool) -> None:
    """Locks an open file for this process, until it is closed; the kernel frees the lock when the process ends. File
    systems of some clusters have no locks: there, it is not locked. Raises BlockingIOError where another process has
    the lock and wait is false."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def discard(path: Path) -> None:
    """Removes a folder. It is renamed first, so that a half-removed one is never taken for a whole one.

    Files that cannot be removed yet (a reader on a network disk still holds them) stay in .trash-… for sweep().
    """
    trash = path.with_name(f".trash-{path.name.lstrip('.')}-{time.time_ns()}")
    path.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path) -> None:
    for trash in folder.glob(".trash-*"):
        shutil.rmtree(trash, ignore_errors=True)


def describe_os_error(error: OSError) -> str:
    """The cause of a failed write in words, and the way out."""
    match error.errno:
        case code if code in _IN_ITS_PLACE:
            return f"something else is in its place ({error.strerror}); rename that, or remove it"
        case code if code in FULL:
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
