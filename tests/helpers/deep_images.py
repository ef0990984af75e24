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
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_KINDS[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def tiff_16(pixels: NDArray[np.uint16], order: str) -> bytes:
    """An uncompressed TIFF file of RGB pixels (H, W, 3). order: "<" or ">"."""
    height, width, channels = pixels.shape
    data = pixels.astype(f"{order}u2").tobytes()
    entries = 9
    bits_at = 8 + 2 + 12 * entries + 4
    data_at = bits_at + 2 * channels
    directory = struct.pack(f"{order}H", entries)
    for tag, kind, count, value in (
        (256, UNSIGNED_LONG, 1, width),
        (257, UNSIGNED_LONG, 1, height),
        (258, UNSIGNED_SHORT, channels, bits_at),
        (259, UNSIGNED_LONG, 1, 1),  # not compressed
        (262, UNSIGNED_LONG, 1, 2),  # RGB
        (273, UNSIGNED_LONG, 1, data_at),
        (277, UNSIGNED_LONG, 1, channels),
        (278, UNSIGNED_LONG, 1, height),
        (279, UNSIGNED_LONG, 1, len(data)),
    ):
        directory += struct.pack(f"{order}HHII", tag, kind, count, value)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    return start + directory + bytes(4) + bits + data
