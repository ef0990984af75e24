"""Damage to image files of which Pillow says nothing: libjpeg's warnings, and the checksums of a PNG's pixels."""

import numpy as np
from PIL import Image, TiffImagePlugin

from kilobatch.data.sources.png_chunks import refuse_damaged_chunks
from kilobatch.data.sources.turbojpeg import judge_jpeg

# Of TIFF's fields.
_COMPRESSION, _STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES, _JPEG_TABLES = 259, 273, 279, 324, 325, 347
_IS_JPEG = 7


def refuse_damage(image: Image.Image, data: bytes) -> None:
    """Raises ValueError where an opened PNG or TIFF is damaged, though Pillow would decode it to something."""
    if image.format == "PNG":
        refuse_damaged_chunks(data)
    elif isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_COMPRESSION) == _IS_JPEG:
        _refuse_damaged_strips(image.tag_v2, data)


def is_whole_jpeg(data: bytes) -> bool:
    """Whether libjpeg-turbo decodes a JPEG file, without a warning. Raises ValueError with the warning where it finds
    damage; what libjpeg-turbo cannot decode at all is left to Pillow."""
    verdict = judge_jpeg(np.frombuffer(data, np.uint8))
    if verdict.problem is not None and not verdict.fatal:
        raise ValueError(verdict.problem)
    return verdict.problem is None


def _refuse_damaged_strips(fields: TiffImagePlugin.ImageFileDirectory_v2, data: bytes) -> None:
    """Strips and tiles are JPEG files, the tables of which may stand in a field of their own."""
    starts, sizes = fields.get(_STRIPS, fields.get(_TILES)), fields.get(_STRIP_BYTES, fields.get(_TILE_BYTES))
    tables = bytes(fields.get(_JPEG_TABLES, b""))[:-2]  # without the mark of their end
    for start, size in zip(starts, sizes, strict=True):
        strip = data[start : start + size]
        is_whole_jpeg(tables + strip[2:] if tables else strip)
