"""Chunks of a PNG file: their checksums, of which Pillow leaves out those of the pixels; and a large file's pixels, a
few rows at a time."""

import io
import struct
import zlib
from collections.abc import Iterable, Iterator

from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGE = 1 << 28  # bytes of pixels; smaller files are decoded as a whole
PIECE = 1 << 16  # bytes to inflate at once: they may become a thousand times as many
TEXTS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the kind of colour: grey, RGB, palette, with opacity


def refuse_damaged_chunks(data: bytes) -> None:
    """Raises ValueError where a chunk is not as it was written. A file that is cut short is left to Pillow."""
    for name, content, checksum in _chunks(data):
        if zlib.crc32(content, zlib.crc32(name)) != checksum:
            raise ValueError(f"its data are damaged: the checksum of a chunk {name.decode('latin-1')!r} differs")


def has_rows_for_bands(image: Image.Image) -> bool:
    """Whether `bands` can read an opened, not yet decoded image, and has to, by its size."""
    if image.format != "PNG" or image.info.get("interlace") or not image.tile:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    raw = image.tile[0][3]  # pyright: ignore[reportAttributeAccessIssue]
    return raw in ("L", "LA", "P", "RGB", "RGBA") and 4 * image.width * image.height > LARGE


def bands(data: bytes, rows: int) -> Iterator[Image.Image]:
    """A PNG's picture from top to bottom, as images of so many rows; the last may have fewer. Raises what Pillow does,
    zlib.error and ValueError.

    Each is decoded as a PNG of its own. Rows refer to the row above them, so that row stands before them.
    """
    chunks = [(name, content) for name, content, _ in _chunks(data)]
    width, height, _, kind = struct.unpack(">IIBB", chunks[0][1][:10])
    stride = 1 + width * CHANNELS[kind]  # with the number of the row's filter
    palette = [chunk for chunk in chunks if chunk[0] in (b"PLTE", b"tRNS")]
    before = bytes(stride)  # no filter, and zeros: what PNG has above the first row
    for filtered in _inflated(chunks, rows * stride, height * stride):
        size = struct.pack(">II", width, 1 + len(filtered) // stride)
        pixels = zlib.compress(before + filtered, 0)
        band = _png([(b"IHDR", size + chunks[0][1][8:]), *palette, (b"IDAT", pixels)])
        with Image.open(io.BytesIO(band), formats=["PNG"]) as image:
            yield image.crop((0, 1, *image.size))
            before = b"\0" + image.crop((0, image.height - 1, *image.size)).tobytes()


def without_pixels(data: bytes) -> bytes:
    """A PNG of one pixel with all that the file says beside its pixels: Pillow looks for some of it behind them."""
    texts = [(name, content) for name, content, _ in _chunks(data) if name in TEXTS]
    first = (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return _png([first, *texts, (b"IDAT", zlib.compress(bytes(2)))])


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, int]]:
    """Name, content and checksum of all chunks that are there in full, up to the file's end or its last chunk's."""
    view, at = memoryview(data), len(SIGNATURE)
    while at + 12 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + size
        if end + 4 > len(data):
            return
        yield name, view[at + 8 : end], struct.unpack_from(">I", data, end)[0]
        if name == b"IEND":
            return
        at = end + 4


def _inflated(chunks: list[tuple[bytes, memoryview]], size: int, total: int) -> Iterator[bytes]:
    """The data of the pixels, in pieces of `size` bytes and a last one with the rest."""
    inflate, waiting, left = zlib.decompressobj(), bytearray(), total
    for name, content in chunks:
        for at in range(0, len(content) if name == b"IDAT" else 0, PIECE):
            waiting += inflate.decompress(content[at : at + PIECE])
            while left > 0 and len(waiting) >= min(size, left):
                taken = min(size, left)
                yield bytes(waiting[:taken])
                del waiting[:taken]
                left -= taken
    if left > 0 or not inflate.eof:
        raise ValueError("image file is truncated")


def _png(chunks: Iterable[tuple[bytes, bytes | memoryview]]) -> bytes:
    parts = [SIGNATURE]
    for name, content in (*chunks, (b"IEND", b"")):
        checksum = zlib.crc32(content, zlib.crc32(name))
        parts += [struct.pack(">I", len(content)), name, bytes(content), struct.pack(">I", checksum)]
    return b"".join(parts)
