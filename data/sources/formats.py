"""Formats of image files: the suffixes that say one, and what the content says where the suffix does not."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from PIL import Image

# Pillow knows these when it sees them, and cannot decode them (EPS without Ghostscript).
NOT_DECODED = frozenset({"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "WMF"})
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
HEIC_HINT = "HEIC images (to read them: pip install pillow-heif)"

Image.init()
if find_spec("pillow_heif"):
    from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

    register_heif_opener()
FORMATS = tuple(sorted(set(Image.OPEN) - NOT_DECODED))
IMAGE_SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def open_image(file: IO[bytes]) -> Image.Image:
    """Opens an image by its content, whatever its name says; decodes nothing yet."""
    return Image.open(file, formats=FORMATS)


def is_heic(start: bytes) -> bool:
    """Whether a file that begins like this (12 bytes) is HEIC, by its brand."""
    return start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS


def recognise(path: Path) -> str | None:
    """The reason why a file is no image that can be decoded, for a count by reason; None: it is one. Raises OSError."""
    with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
        try:
            with open_image(file) as image:
                if image.format not in Image.OPEN or Image.OPEN[image.format][1] is not None:
                    return None  # known by its first bytes (MPO by JPEG's): if it is damaged, decoding says how
                image.load()  # TGA, for one, has no such bytes, and a text may look like its header
                return None
        except Image.DecompressionBombError:
            return None
        except Exception:  # on foreign bytes Pillow's readers raise nearly anything
            file.seek(0)
            if is_heic(file.read(12)):
                return HEIC_HINT
            return f"not images ({path.suffix.lower() or 'no suffix'})"
