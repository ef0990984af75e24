"""Reads TensorFlow's index of a checkpoint: a sorted table of keys and values in LevelDB's format.

Format: github.com/google/leveldb, doc/table_format.md; TensorFlow's form: tensorflow/core/lib/io/format.cc.
"""

from collections.abc import Iterator

from kilobatch.trainer.tf_import.crc32c import masked_crc32c

FOOTER = 48  # bytes: two handles, padding, the magic number
MAGIC = 0xDB4775248B80FB57
TRAILER = 5  # bytes after each block: its compression, its checksum


def read_table(file: bytes) -> dict[bytes, bytes]:
    """All keys and values of a table. Raises ValueError, which says what is wrong; every block has a checksum."""
    if len(file) < FOOTER:
        raise ValueError(f"it has {len(file)} bytes, fewer than the footer of a table")
    if int.from_bytes(file[-8:], "little") != MAGIC:
        raise ValueError("it does not end as a table does")
    at = len(file) - FOOTER
    for _ in range(2):  # skips the two numbers of the metaindex block's handle; TensorFlow leaves that block empty
        _, at = varint(file, at)
    index, _ = _handle(file, at)
    table = {}
    for _, handle in _entries(_block(file, *index)):
        table.update(_entries(_block(file, *_handle(handle, 0)[0])))
    return table


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number stored in groups of seven bits, lowest first, and the position after it. Raises ValueError."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number in it does not end")


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return (offset, size), at


def _block(file: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    if end + TRAILER > len(file) - FOOTER:
        raise ValueError(f"a block of it would reach to byte {end + TRAILER} of {len(file)}")
    if masked_crc32c(file[offset : end + 1]) != int.from_bytes(file[end + 1 : end + TRAILER], "little"):
        raise ValueError(f"the checksum of its bytes {offset} to {end} does not match them")
    if file[end]:
        raise ValueError("it is compressed, which TensorFlow's own are not since its version 1.2")
    return file[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the keys and values of a block. A key is stored as the length that it shares with the key before, and the
    rest of it."""
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = len(block) - 4 - 4 * restarts, 0, b""
    while at < end:
        shared, at = varint(block, at)
        more, at = varint(block, at)
        length, at = varint(block, at)
        key = key[:shared] + block[at : at + more]
        yield key, block[at + more : at + more + length]
        at += more + length
    if at != end:
        raise ValueError("an entry of it reaches past the end of its block")
