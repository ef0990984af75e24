"""Formats of image files: the suffixes that say one, and what the content says where the suffix does not."""

import warnings
from pathlib import Path

from PIL import Image

Image.init()
IMAGE_SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def recognise(path: Path) -> str | None:
    """Why a file is no image that Pillow reads, for a count by reason; None: it is one. Raises OSError."""
    with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
        try:
            with Image.open(file) as image:
                if Image.OPEN[image.format or ""][1] is not None:
                    return None  # known by its first bytes: if it is damaged, decoding says how
                image.load()  # TGA, for one, has no such bytes, and a text may look like its header
                return None
        except Image.DecompressionBombError:
            return None
        except Exception:  # on foreign bytes Pillow's readers raise nearly anything
            return f"not images ({path.suffix.lower() or 'no suffix'})"
