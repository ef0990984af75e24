"""Writers of image files with 16 bits a channel, which Pillow cannot write in colour."""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_PNG_KINDS = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels
UNSIGNED_SHORT, UNSIGNED_LONG = 3, 4


def png_16(pixels: NDArray[np.uint16]) -> bytes:
    """A PNG file of pixels (H, W) or (H, W, 1 to 4), each row filtered by what stands to the left."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    before = np.pad(rows, ((0, 0), (2 * channels, 0)))[:, : rows.shape[1]]
    filtered = np.hstack([np.ones((height, 1), np.uint8), rows - before])
    return png_of(width, height, 16, _PNG_KINDS[channels], zlib.compress(filtered.tobytes()))


def png_of(width: int, height: int, depth: int, kind: int, pixels: bytes) -> bytes:
    """A PNG file. kind: of colours, as in PNG; pixels: filtered and compressed."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def tiff_16(
    pixels: NDArray[np.uint16 | np.uint32],
    order: str = "<",
    *,
    photometric: int = 2,
    separate: bool = False,
    extra: int | None = None,
) -> bytes:
    """An uncompressed TIFF file of pixels (H, W) or (H, W, C), of as many bits as they have.

    order: "<" or ">"; photometric: 0 (white is zero), 1 (grey) or 2 (RGB); separate: one plane after another; extra:
    what the fourth channel is, 1 for an opacity with which the colours are multiplied, 2 for one with which they are
    not.
    """
    height, width = pixels.shape[:2]
    planes = np.moveaxis(np.atleast_3d(pixels), 2, 0)
    channels, depth = len(planes), pixels.dtype.itemsize
    data = (planes if separate else pixels).astype(f"{order}u{depth}").tobytes()
    size = len(data) // channels if separate else len(data)
    extras = [] if extra is None else [(338, UNSIGNED_SHORT, [extra])]
    count = 11 + len(extras)
    lists_at = 8 + 2 + 12 * count + 4
    data_at = lists_at + 12 * channels
    fields = [
        (256, UNSIGNED_LONG, [width]),
        (257, UNSIGNED_LONG, [height]),
        (258, UNSIGNED_SHORT, [8 * depth] * channels),
        (259, UNSIGNED_SHORT, [1]),  # not compressed
        (262, UNSIGNED_SHORT, [photometric]),
        (273, UNSIGNED_LONG, [data_at + i * size for i in range(channels if separate else 1)]),
        (277, UNSIGNED_SHORT, [channels]),
        (278, UNSIGNED_LONG, [height]),
        (279, UNSIGNED_LONG, [size] * (channels if separate else 1)),
        (284, UNSIGNED_SHORT, [2 if separate else 1]),
        *extras,
        (339, UNSIGNED_SHORT, [1] * channels),
    ]
    return _tiff_header(order, fields, lists_at).ljust(data_at, b"\0") + data


def _tiff_header(order: str, fields: list[tuple[int, int, list[int]]], lists_at: int) -> bytes:
    """Header and directory; lists of more than four bytes stand behind it."""
    directory, lists = struct.pack(f"{order}H", len(fields)), b""
    for tag, kind, values in fields:
        packed = struct.pack(f"{order}{len(values)}{'H' if kind == UNSIGNED_SHORT else 'I'}", *values)
        if len(packed) > 4:
            packed, lists = struct.pack(f"{order}I", lists_at + len(lists)), lists + packed
        directory += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + directory + bytes(4) + lists


def netpbm_16(pixels: NDArray[np.uint16], highest: int, *, plain: bool = False) -> bytes:
    """A PGM or PPM file of pixels (H, W) or (H, W, 3). highest: the value that its header gives to white; plain: in
    decimal digits."""
    kind = (2 if plain else 5) + (pixels.ndim == 3)
    header = f"P{kind}\n# a comment\n{pixels.shape[1]} {pixels.shape[0]}\n{highest}\n".encode()
    if not plain:
        return header + pixels.astype(">u2").tobytes()
    return header + b"# another\n" + b"\n".join(b"%d" % value for value in pixels.ravel())


def sgi_16(pixels: NDArray[np.uint16]) -> bytes:
    """An uncompressed SGI file of pixels (H, W, 3)."""
    height, width, channels = pixels.shape
    header = struct.pack(">HBBHHHHII", 474, 0, 2, 3, width, height, channels, 0, 65_535)
    return header.ljust(512, b"\0") + np.moveaxis(pixels[::-1], 2, 0).astype(">u2").tobytes()
