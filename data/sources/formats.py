"""Formats of image files: the suffixes that say one, and what the content says where the suffix does not."""

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from PIL import Image, TiffImagePlugin

from kilobatch.data.sources.path_names import printable

# Pillow knows these when it sees them, and cannot decode them (EPS without Ghostscript).
NOT_DECODED = frozenset({"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "WMF"})
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
NEW_SUBFILE_TYPE, REDUCED = 254, 1  # TIFF's field, and its bit for a smaller copy of another picture in the file
LARGE = 1 << 30  # bytes of a decoded image
TGA_BITS = {"1": 1, "P": 8, "L": 8, "LA": 16, "BGRA;15Z": 16, "BGR": 24, "BGRA": 32}  # of a pixel, by Pillow's raw mode
TGA_END = b"TRUEVISION-XFILE.\0"
HEIC_HINT = "HEIC images (to read them: pip install pillow-heif)"

Image.init()
if find_spec("pillow_heif"):
    from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

    register_heif_opener()
FORMATS = tuple(sorted(set(Image.OPEN) - NOT_DECODED))
IMAGE_SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def open_image(file: IO[bytes]) -> Image.Image:
    """Opens an image by its content, whatever its name says; decodes nothing yet. Raises what Pillow does, and
    ValueError for a camera's raw file: Pillow reads the preview in it, and not the picture."""
    image = Image.open(file, formats=FORMATS)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(NEW_SUBFILE_TYPE, 0) & REDUCED:
        raise ValueError("the first picture in it is a preview of another, as in raw files of cameras: save that one")
    return image


def may_exceed_memory(width: int, height: int) -> bool:
    """Whether it is an image's own size that memory does not hold; else others have taken the memory."""
    return 4 * width * height > LARGE


def is_unread_heic(start: bytes) -> bool:
    """Whether a file that begins like this (12 bytes) is HEIC, by its brand, and nothing is installed that reads it."""
    return "HEIF" not in FORMATS and start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS


def recognise(path: Path) -> str | None:
    """The reason why a file is no image that can be decoded, for a count by reason; None: it is one. Raises OSError.

    For files whose suffix is not an image's: of TGA, which has no first bytes of its own, those alone are taken that
    have its last bytes, or that have no other bytes than the pixels. Small numbers would often be a header, too.
    """
    with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
        try:
            with open_image(file) as image:
                if image.format not in Image.OPEN or Image.OPEN[image.format][1] is not None:
                    return None  # known by its first bytes (MPO by JPEG's): if it is damaged, decoding says how
                whole = image.format != "TGA" or _ends_as_tga(file) or _has_its_pixels_alone(image, file)
                image.load()  # a text may look like a header of these formats
                if whole:
                    return None
        except Image.DecompressionBombError:
            if _has_first_bytes(file) or _ends_as_tga(file):
                return None
        except Exception:  # on foreign bytes Pillow's readers raise nearly anything
            file.seek(0)
            if is_unread_heic(file.read(12)):
                return HEIC_HINT
        return f"not images ({printable(path.suffix.lower()).strip() or 'no suffix'})"


def _has_its_pixels_alone(image: Image.Image, file: IO[bytes]) -> bool:
    """Whether a TGA file ends where its pixels do, which are not compressed. image: opened, not yet decoded."""
    codec, _, start, arguments = image.tile[0]  # pyright: ignore[reportAttributeAccessIssue]
    row = -(-image.width * TGA_BITS[arguments[0]] // 8)
    return codec == "raw" and file.seek(0, os.SEEK_END) == start + row * image.height


def _ends_as_tga(file: IO[bytes]) -> bool:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - len(TGA_END)))
    return file.read() == TGA_END


def _has_first_bytes(file: IO[bytes]) -> bool:
    """Whether a file begins as one of the formats does that have first bytes of their own."""
    file.seek(0)
    start = file.read(16)
    return any(accept is not None and accept(start) is True for _, accept in (Image.OPEN[kind] for kind in FORMATS))
