"""Pixels of more than 8 bits: read in full, where Pillow keeps the high byte of a colour alone, and brought to 8 bits.

Microscopes and X-ray cameras write 10 to 14 bits into files of 16. With the high byte alone such images are nearly
black, so the range of the values has to be known.
"""

import io
import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from kilobatch.data.sources.damage import refuse_damage
from kilobatch.data.sources.formats import may_exceed_memory, open_image
from kilobatch.data.sources.memory_budget import BUDGET, DEEP_BYTES

_COLOURS = re.compile(r"(L|LA|RGB|RGBA|RGBa|RGBX);16([BLN])")
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B"}  # N is this machine's order: little-endian
# Of TIFF's fields.
_BITS, _COMPRESSION, _PHOTOMETRIC, _STRIPS, _ORIENTATION, _SAMPLES, _STRIP_BYTES, _PLANAR, _EXTRA, _SAMPLE_FORMAT = (
    *(258, 259, 262, 273, 274, 277, 279, 284, 338, 339),
)
_SEPARATE, _UNCOMPRESSED, _WHITE_IS_ZERO, _PREMULTIPLIED, _UNSPECIFIED, _UNSIGNED = 2, 1, 0, (1,), (0,), (1,)
_ROWS = 256  # brought to 8 bits at once: so many rows of floating-point numbers are held, not all
_SGI_HEADER = 512  # bytes


class UnknownRangeError(Exception):
    """An image has more than 8 bits, and nobody has said yet which values become black and white."""


class DeepPixels(NamedTuple):
    """values (H, W) or (H, W, C), as they are stored; the last of 2 or 4 channels is the opacity, up to 65,535.
    white_is_low: the lowest value is white, as in many X-ray images."""

    values: NDArray[np.generic]
    white_is_low: bool = False

    @property
    def colours(self) -> NDArray[np.generic]:
        return self.values[..., :-1] if self.has_opacity else self.values

    @property
    def has_opacity(self) -> bool:
        return self.values.ndim == 3 and self.values.shape[2] in (2, 4)


def is_deep(image: Image.Image) -> bool:
    """Whether an opened, not yet decoded image has more than 8 bits a channel. Raises ValueError where Pillow reads
    8 of them alone."""
    if image.format == "JPEG2000" and image.mode != "I;16" and (bits := _bits_of_jpeg2000(image)) > 8:
        raise ValueError(f"JPEG 2000 in colour or with opacity is read with 8 bits, not {bits}: save it as PNG or TIFF")
    return (
        image.mode == "F"
        or image.mode.startswith("I")
        or _colours(image) is not None
        or _is_deep_netpbm(image)
        or _codec(image) == "SGI16"
        or _has_separate_planes(image)
    )


def read_deep(data: bytes) -> DeepPixels:
    """The pixels of an image file with more than 8 bits a channel. Raises what Pillow does, and ValueError."""
    with open_image(io.BytesIO(data)) as image:
        fields = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        values = _values(image, fields, data)
        transparent = image.info.get("transparency") if image.format == "PNG" else None
        if transparent is not None:  # Pillow's number or colour, of 16 bits
            opacity = 65_535 * np.atleast_3d(values != np.array(transparent, np.uint16)).any(2, keepdims=True)
            values = np.concatenate([np.atleast_3d(values), opacity.astype(np.uint16)], 2)
        return DeepPixels(values, fields.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def to_8_bits(pixels: DeepPixels, value_range: tuple[float, float]) -> Image.Image:
    """An image whose values of `value_range` have become 0 to 255, rounded, and those outside it clipped."""
    low, high = value_range
    out = np.empty(pixels.values.shape, np.uint8)
    for start in range(0, len(out), _ROWS):
        values = pixels.values[start : start + _ROWS].astype(np.float64)
        scaled = ((values - low) * 255 / (high - low)).round().clip(0, 255)
        if pixels.white_is_low:
            scaled = 255 - scaled
        if pixels.has_opacity:
            scaled[..., -1] = (values[..., -1] / 257).round()
        out[start : start + _ROWS] = scaled
    return Image.fromarray(out)


def values_of(data: bytes) -> tuple[float, float] | None:
    """The lowest and the highest value of an image file's colours; None: it has 8 bits, floating-point
    numbers, or is no image."""
    width = height = 0
    try:
        with open_image(io.BytesIO(data)) as image:
            width, height = image.size
            if not is_deep(image) or image.mode == "F":
                return None
            refuse_damage(image, data)  # else noise in a file that is left out would darken all others
        with BUDGET.of(DEEP_BYTES * width * height):
            colours = read_deep(data).colours
            return float(colours.min()), float(colours.max())
    except MemoryError:
        if not may_exceed_memory(width, height):
            raise
        return None
    except Exception:  # a broken file, which is refused when it is encoded
        return None


def range_of_bits(low: float, high: float) -> tuple[float, float]:
    """From 0 to the highest value of as many bits as `high` needs, 8 or more; from `low` where there are negative
    values."""
    if low < 0:
        return low, max(high, low + 1)
    return 0, 2 ** max(8, int(high).bit_length()) - 1


def _values(image: Image.Image, fields: TiffImagePlugin.ImageFileDirectory_v2 | dict, data: bytes) -> NDArray:
    if _is_deep_netpbm(image):
        return _read_netpbm(image, data)
    if _codec(image) == "SGI16":
        return _read_sgi(image, data)
    if _has_separate_planes(image):
        values = _read_planes(image, fields, data)
    elif (colours := _colours(image)) is not None:
        if colours[1] == "LA":  # read as four channels: both bytes of the grey, both of the opacity
            return _decode(data, "RGBA", "RGBA").view(">u2").astype(np.uint16)
        # Pillow takes the first or the last byte of each value, by the order that it is told: so it is told both.
        # It would divide by the opacity in 8 bits, so of RGBa it is told that it is RGBA.
        orders = colours[2], _OTHER_ORDER[colours[2]]
        high, low = (_decode(data, image.mode, f"{colours[1].replace('a', 'A')};16{order}") for order in orders)
        values = np.stack([low, high], -1).view("<u2")[..., 0]
    else:
        unstretched = 16 - _bits_of_jpeg2000(image) if image.format == "JPEG2000" else 0
        header = data[: image.tile[0][2]] if image.format == "FITS" else b""  # pyright: ignore[reportAttributeAccessIssue]
        image.load()
        values = np.asarray(image)
        if header:
            return _fits_numbers(values, header)
        if unstretched > 0:  # Pillow stretches the values to 16 bits
            return values >> unstretched
        if values.dtype == np.int32 and fields and fields.get(_SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED:
            return values.view(np.uint32)  # Pillow has no such numbers: the large ones would be negative
    return _without_premultiplying(values) if fields.get(_EXTRA) == _PREMULTIPLIED else values


def _colours(image: Image.Image) -> re.Match[str] | None:
    arguments = _arguments(image)
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return _COLOURS.fullmatch(raw) if isinstance(raw, str) else None


def _arguments(image: Image.Image) -> object:
    tile = getattr(image, "tile", None)
    return tile[0][3] if tile else None


def _codec(image: Image.Image) -> str | None:
    tile = getattr(image, "tile", None)
    return tile[0][0] if tile else None


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


def _is_deep_netpbm(image: Image.Image) -> bool:
    """PGM and PPM whose values go up to more than 255; those that Pillow's raw decoder reads are as they are."""
    arguments = _arguments(image)
    return _codec(image) in ("ppm", "ppm_plain") and isinstance(arguments, tuple) and arguments[1] > 255


def _read_netpbm(image: Image.Image, data: bytes) -> NDArray[np.uint16]:
    """Pillow brings the values to 8 bits, or to 16, by the highest that the header allows."""
    start = image.tile[0][2]  # pyright: ignore[reportAttributeAccessIssue]
    shape = (image.height, image.width, *([3] if image.mode == "RGB" else []))
    count = int(np.prod(shape))
    if _codec(image) == "ppm":
        return np.frombuffer(data, ">u2", count, start).reshape(shape).astype(np.uint16)
    words = re.sub(rb"#[^\r\n]*", b"", data[start:]).split(maxsplit=count)[:count]
    return np.array([int(word) for word in words], np.uint16).reshape(shape)


def _read_sgi(image: Image.Image, data: bytes) -> NDArray[np.uint16]:
    """An uncompressed SGI image: planes one after another, rows from below."""
    channels = len(image.getbands())
    planes = np.frombuffer(data, ">u2", channels * image.height * image.width, _SGI_HEADER)
    upright = planes.reshape(channels, image.height, image.width)[:, ::-1].astype(np.uint16)
    return np.moveaxis(upright, 0, 2) if channels > 1 else upright[0]


def _has_separate_planes(image: Image.Image) -> bool:
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    fields = image.tag_v2
    return fields.get(_PLANAR) == _SEPARATE and fields.get(_SAMPLES, 1) > 1 and max(fields.get(_BITS, (1,))) > 8


def _read_planes(
    image: Image.Image, fields: TiffImagePlugin.ImageFileDirectory_v2 | dict, data: bytes
) -> NDArray[np.uint16]:
    """A TIFF with one plane after another, which Pillow takes for 8 bits."""
    if fields.get(_COMPRESSION, _UNCOMPRESSED) != _UNCOMPRESSED or _STRIPS not in fields or set(fields[_BITS]) != {16}:
        raise ValueError(
            "its channels of more than 8 bits stand in separate planes, compressed or in tiles: save it with "
            "interleaved channels"
        )
    strips = zip(fields[_STRIPS], fields[_STRIP_BYTES], strict=True)
    content = b"".join(data[start : start + size] for start, size in strips)
    order = ">" if data[:2] == b"MM" else "<"
    orientation = fields.get(_ORIENTATION, 1)
    size = (image.width, image.height) if orientation in (5, 6, 7, 8) else (image.height, image.width)
    planes = np.frombuffer(content, f"{order}u2").reshape(fields[_SAMPLES], *size)
    if fields.get(_EXTRA) == _UNSPECIFIED:
        planes = planes[:-1]
    if orientation in (5, 6, 7, 8):
        planes = planes.swapaxes(1, 2)
    if orientation in (2, 3, 6, 7):
        planes = planes[:, :, ::-1]
    if orientation in (3, 4, 7, 8):
        planes = planes[:, ::-1]
    return np.moveaxis(planes.astype(np.uint16), 0, 2)


def _bits_of_jpeg2000(image: Image.Image) -> int:
    """The most bits of a channel, as the codestream's header says; 8 where there is none, which Pillow will refuse."""
    file = image.fp  # pyright: ignore[reportAttributeAccessIssue]
    file.seek(0)
    data = file.read()
    at = data.find(b"\xff\x4f\xff\x51")
    if at < 0 or at + 42 > len(data):
        return 8
    channels = int.from_bytes(data[at + 40 : at + 42])
    return max(((depth & 127) + 1 for depth in data[at + 42 : at + 42 + 3 * channels : 3]), default=8)


def _fits_numbers(values: NDArray[np.generic], header: bytes) -> NDArray[np.generic]:
    """Numbers of a FITS file, which are signed, as its header scales and shifts them: unsigned ones are shifted."""
    cards = {header[at : at + 8].strip(): header[at + 10 : at + 80] for at in range(0, len(header), 80)}
    scale, zero = (
        float(cards.get(key, default).split(b"/")[0]) for key, default in ((b"BSCALE", b"1"), (b"BZERO", b"0"))
    )
    signed = values.view(np.int16) if values.dtype == np.uint16 else values
    return signed.astype(np.float64) * scale + zero


def _without_premultiplying(values: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """(H, W, 4): colours as they were before they were multiplied with the opacity."""
    opacity = values[..., 3:].astype(np.uint32)
    colours = (values[..., :3].astype(np.uint32) * 65_535 + opacity // 2) // np.maximum(opacity, 1)
    return np.concatenate([colours.clip(max=65_535).astype(np.uint16), values[..., 3:]], axis=2)
