"""Pixels of more than 8 bits: read in full, where Pillow keeps the high byte of a colour alone, and brought to 8 bits.

Microscopes and X-ray cameras write 10 to 14 bits into files of 16. With the high byte alone such images are nearly
black, so the range of the values has to be known.
"""

import io
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kilobatch.data.sources.formats import open_image

_COLOURS = re.compile(r"(L|LA|RGB|RGBA|RGBX);16([BLN])")
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B"}  # N is this machine's order: little-endian


class UnknownRangeError(Exception):
    """An image has more than 8 bits, and nobody has said yet which values become black and white."""


def is_deep(image: Image.Image) -> bool:
    """Whether an opened, not yet decoded image has more than 8 bits a channel."""
    return image.mode == "F" or image.mode.startswith("I") or _colours(image) is not None


def read_deep(data: bytes) -> NDArray[np.generic]:
    """(H, W) or (H, W, C): the pixels of an image file with more than 8 bits a channel, as they are stored."""
    with open_image(io.BytesIO(data)) as image:
        colours = _colours(image)
        if colours is None:
            image.load()
            return np.asarray(image)
        if colours[1] == "LA":  # read as four channels: both bytes of the grey, both of the opacity
            return _decode(data, "RGBA", "RGBA").view(">u2").astype(np.uint16)
        # Pillow takes the first or the last byte of each value, by the order that it is told: so it is told both.
        high, low = (_decode(data, image.mode, f"{colours[1]};16{order}") for order in _orders(colours[2]))
        return high.astype(np.uint16) << 8 | low


def to_8_bits(pixels: NDArray[np.generic], value_range: tuple[float, float]) -> Image.Image:
    """An image whose values of `value_range` have become 0 to 255, rounded, and those outside it clipped. The opacity
    of pixels (H, W, 2 or 4) always ends at 65,535."""
    low, high = value_range
    scaled = ((pixels.astype(np.float64) - low) * 255 / (high - low)).round().clip(0, 255)
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        scaled[..., -1] = (pixels[..., -1].astype(np.float64) / 257).round()
    return Image.fromarray(scaled.astype(np.uint8))


def values_of(data: bytes) -> tuple[float, float] | None:
    """The lowest and the highest value of an image file's colours; None: it has 8 bits, floating-point
    numbers, or is no image."""
    try:
        with open_image(io.BytesIO(data)) as image:
            if not is_deep(image) or image.mode == "F":
                return None
        pixels = read_deep(data)
    except MemoryError:
        raise
    except Exception:  # a broken file, which is refused when it is encoded
        return None
    colours = pixels[..., :-1] if pixels.ndim == 3 and pixels.shape[2] in (2, 4) else pixels
    return float(colours.min()), float(colours.max())


def range_of_bits(low: float, high: float) -> tuple[float, float]:
    """From 0 to the highest value of as many bits as `high` needs, 8 or more; from `low` where there are negative
    values."""
    if low < 0:
        return low, max(high, low + 1)
    return 0, 2 ** max(8, int(high).bit_length()) - 1


def _colours(image: Image.Image) -> re.Match[str] | None:
    tile = getattr(image, "tile", None)
    if not tile:
        return None
    arguments = tile[0][3]
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return _COLOURS.fullmatch(raw) if isinstance(raw, str) else None


def _orders(order: str) -> tuple[str, str]:
    return order, _OTHER_ORDER[order]


def _decode(data: bytes, mode: str, raw: str) -> NDArray[np.uint8]:
    """Decodes with Pillow as if the file had this mode and order of bytes."""
    with open_image(io.BytesIO(data)) as image:
        image._mode = mode
        tiles = []
        for codec, extents, offset, arguments in image.tile:  # pyright: ignore[reportAttributeAccessIssue]
            told = (raw, *arguments[1:]) if isinstance(arguments, tuple) else raw
            tiles.append(type(image.tile[0])(codec, extents, offset, told))  # pyright: ignore[reportAttributeAccessIssue]
        image.tile = tiles  # pyright: ignore[reportAttributeAccessIssue]
        image.load()
        return np.asarray(image)
