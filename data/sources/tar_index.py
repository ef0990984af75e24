"""Members of a .tar file: their names, and where their bytes are, read from the headers alone.

The standard library's reader keeps an object of a kilobyte for each member, and takes ten times as long.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kilobatch.data.errors import UserError

BLOCK = 512
FILES = b"0\0 7"  # type flags of files: also those of old archives, and of contiguous files
LONG_NAME, LONG_LINK, EXTENDED, EXTENDED_FOR_ALL = b"L", b"K", b"x", b"g"
LARGEST_EXTRA = 1 << 20  # bytes of a long name, or of extended headers
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A file in an archive. start: where its bytes begin, size: how many they are; regular: whether it is a file and
    not a link or a device (folders are left out)."""

    name: str
    start: int
    size: int
    regular: bool


def tar_members(path: Path) -> Iterator[Member]:
    """The members of an archive that are no folders, in order. Raises UserError where it cannot be read, is compressed
    or damaged."""
    try:
        with path.open("rb") as file:
            descriptor, end = file.fileno(), os.fstat(file.fileno()).st_size
            yield from _members(path, descriptor, end)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions and its disk") from error


def _members(path: Path, descriptor: int, end: int) -> Iterator[Member]:
    at, extra, seen = 0, dict[str, str](), False
    while at < end:
        header = os.pread(descriptor, BLOCK, at)
        if len(header) == BLOCK and not header.strip(b"\0"):
            return  # two blocks of zeros end an archive; some have but one
        _check(path, header, at)
        seen = True
        kind, start = header[156:157], at + BLOCK
        size = int(extra["size"]) if "size" in extra else _number(path, header[124:136], at)
        at = start + -(-size // BLOCK) * BLOCK
        if start + size > end:
            raise UserError(
                f"{path} is cut short: its member at byte {start - BLOCK:,} has {size:,} bytes; copy it again"
            )
        if kind in (LONG_NAME, LONG_LINK, EXTENDED, EXTENDED_FOR_ALL):
            if size > LARGEST_EXTRA:
                raise UserError(
                    f"{path} is damaged: its header at byte {start - BLOCK:,} has {size:,} bytes; copy it again"
                )
            data = os.pread(descriptor, size, start)
            if kind == LONG_NAME:
                extra["path"] = os.fsdecode(data.rstrip(b"\0"))
            elif kind == EXTENDED:
                extra |= _records(data)
            continue
        name, extra = extra.get("path") or _name(header), {}
        if kind != b"5" and not name.endswith("/"):
            yield Member(name, start, size, kind in FILES or kind == b"")
    if not seen:
        raise UserError(f"{path} is empty, not a .tar file; write it again")


def _check(path: Path, header: bytes, at: int) -> None:
    """Raises UserError where a header's checksum, the sum of its bytes, is another."""
    if len(header) == BLOCK:
        stored = header[148:156].strip(b"\0 ")
        if stored and all(byte in b"01234567" for byte in stored):
            total = sum(header) - sum(header[148:156]) + 8 * 32
            if int(stored, 8) == total:
                return
    if at == 0:
        kind = next((name for start, name in COMPRESSED.items() if header.startswith(start)), None)
        if kind:
            raise UserError(f"{path} is compressed ({kind}); images hardly shrink: decompress it, and name the .tar")
        raise UserError(f"{path} is not a .tar file; give WebDataset's shards")
    raise UserError(f"{path} is damaged or cut short: byte {at:,} begins no member; copy or write it again")


def _number(path: Path, field: bytes, at: int) -> int:
    """A number in octal digits or, above 8 GiB, in bytes."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise UserError(f"{path} is damaged: its member at byte {at:,} has no size; copy or write it again") from None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return os.fsdecode(prefix + b"/" + name if prefix else name)


def _records(data: bytes) -> dict[str, str]:
    """Those of extended headers that say where a member is: "LENGTH KEY=VALUE\\n" each."""
    found: dict[str, str] = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not (space and length.isdigit() and 0 < int(length) <= len(data)):
            break
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = os.fsdecode(value)
        data = data[int(length) :]
    return found
