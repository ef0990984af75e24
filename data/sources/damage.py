"""Damage to image files of which Pillow says nothing: libjpeg's warnings, and the checksums of pixels in PNG
and TIFF."""

import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, TiffImagePlugin

from kilobatch.data.sources.libtiff import fax_problem
from kilobatch.data.sources.png_chunks import refuse_damaged_chunks
from kilobatch.data.sources.turbojpeg import judge_jpeg

# Of TIFF's fields.
_COMPRESSION, _STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES, _JPEG_TABLES = 259, 273, 279, 324, 325, 347
_FAX = (2, 3, 4)  # kinds of compression: lines of their own, group 3, group 4
PIECE = 1 << 20  # bytes to inflate at once


def refuse_damage(image: Image.Image, data: bytes) -> None:
    """Raises ValueError where an opened PNG or TIFF is damaged, though Pillow would decode it to something."""
    if image.format == "PNG":
        refuse_damaged_chunks(data)
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        compression = image.tag_v2.get(_COMPRESSION, 0)
        check = _CHECKS.get(compression)
        if compression in _FAX and _STRIPS in image.tag_v2 and (problem := fax_problem(data)) is not None:
            raise ValueError(problem)
        if check is not None:
            tables = bytes(image.tag_v2.get(_JPEG_TABLES, b""))[:-2]  # without the mark of their end
            for strip in _strips(image.tag_v2, data):
                check(strip, tables)


def is_whole_jpeg(data: bytes) -> bool:
    """Whether libjpeg-turbo decodes a JPEG file, without a warning. Raises ValueError with the warning where it finds
    damage; what libjpeg-turbo cannot decode at all is left to Pillow."""
    verdict = judge_jpeg(np.frombuffer(data, np.uint8))
    if verdict.problem is not None and not verdict.fatal:
        raise ValueError(verdict.problem)
    return verdict.problem is None


def _strips(fields: TiffImagePlugin.ImageFileDirectory_v2, data: bytes) -> Iterator[bytes]:
    starts, sizes = fields.get(_STRIPS, fields.get(_TILES)), fields.get(_STRIP_BYTES, fields.get(_TILE_BYTES))
    if starts is None or sizes is None or len(starts) != len(sizes):
        raise ValueError("its data are damaged: it does not say where all of its pixels are")
    return (data[start : start + size] for start, size in zip(starts, sizes, strict=True))


def _refuse_damaged_jpeg(strip: bytes, tables: bytes) -> None:
    """Strips and tiles are JPEG files, the tables of which may stand in a field of their own."""
    is_whole_jpeg(tables + strip[2:] if tables else strip)


def _refuse_damaged_zlib(strip: bytes, _tables: bytes) -> None:
    """libtiff may stop before the checksum, at the end of the pixels. A strip that is cut short is left to it."""
    inflate, rest = zlib.decompressobj(), strip
    try:
        while rest and not inflate.eof:
            inflate.decompress(rest, PIECE)
            rest = inflate.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"its data are damaged: {error}") from error


_CHECKS = {7: _refuse_damaged_jpeg, 8: _refuse_damaged_zlib, 32_946: _refuse_damaged_zlib}  # by TIFF's compression
