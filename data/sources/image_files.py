"""Decodes an image file to upright RGB, and encodes it as a .beton stores it."""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin

from kilobatch.data.beton_writer import Writer
from kilobatch.data.errors import UserError

RAW_SIDE = 64  # up to this side pixels are stored as they are: decoding a JPEG would cost more than reading them
LONGEST = 65_500  # libjpeg's limit; the .beton's own is 65,535

# The operation that turns an image of each EXIF orientation upright, as a viewer does.
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImage(UserError):
    """An image that cannot be decoded; the text names it, with the reason."""


@dataclass(frozen=True)
class EncodedImage:
    """An image as a .beton holds it. mode 0: data is a JPEG file; mode 1: RGB pixels, (height, width, 3) uint8."""

    mode: int
    width: int
    height: int
    data: bytes


def read_image(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decodes an image file's first picture: upright RGB, (H, W, 3) uint8. Raises BrokenImage with `name` in it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return np.array(_upright_rgb(image))
    except MemoryError:
        raise
    except Exception as error:  # on foreign bytes Pillow's decoders raise nearly anything
        raise _broken_image(data, name, error) from error


def encode_file(data: bytes, name: str, max_side: int | None, quality: int) -> EncodedImage:
    """Encodes an image file for a .beton: its first picture, upright, RGB, no side longer than `max_side` pixels.

    A JPEG file that needs no change is kept byte for byte, others are encoded with `quality`, small ones stored as
    pixels. Every byte is decoded, so that a broken file is found here. Raises BrokenImage with `name` in its text.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if max_side is None or max(image.size) <= max_side:
                image.load()
                if max(image.size) > RAW_SIDE and _can_keep(image, data):
                    return EncodedImage(0, *image.size, data)
            else:
                image.draft(None, (2 * max_side, 2 * max_side))  # JPEG: decode straight to a half, quarter or eighth
                image.load()
            return encode(_upright_rgb(image), max_side, quality)
    except MemoryError:
        raise
    except Exception as error:  # on foreign bytes Pillow's decoders raise nearly anything
        raise _broken_image(data, name, error) from error


def encode(image: Image.Image, max_side: int | None, quality: int) -> EncodedImage:
    """Encodes an RGB image, downscaled (Lanczos) to `max_side`: as pixels up to 64 on the longer side, else as JPEG."""
    longest = max(image.size)
    if max_side is not None and longest > max_side:
        width, height = (max(1, round(side * max_side / longest)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if max(image.size) <= RAW_SIDE:
        return EncodedImage(1, *image.size, image.tobytes())
    if max(image.size) > LONGEST:
        raise ValueError(f"{max(image.size):,} pixels on a side, the most is {LONGEST:,}: give a --max-side")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    if len(file.getvalue()) > Writer.PAGE:
        raise ValueError(f"{len(file.getvalue()):,} bytes as JPEG, the most is {Writer.PAGE:,}: give a --max-side")
    return EncodedImage(0, *image.size, file.getvalue())


def _can_keep(image: Image.Image, data: bytes) -> bool:
    """Whether FFCV's decoder (libturbojpeg) decodes this file as Pillow does, and as fast as any other."""
    if image.format != "JPEG" or len(data) > Writer.PAGE or image.info.get("progressive") or _orientation(image) != 1:
        return False
    if image.mode == "L":
        return True
    return image.mode == "RGB" and JpegImagePlugin.get_sampling(image) in (0, 1, 2)  # 4:4:4, 4:2:2, 4:2:0


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, KeyError, EOFError):  # an unreadable EXIF block is ignored, as viewers do
        return 1


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Converts grey, palette, CMYK and 16 bits to RGB, and turns upright; transparent parts become white."""
    transpose = _TO_UPRIGHT.get(_orientation(image))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 bits")
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65_535:
            raise ValueError("its pixels have 32 bits; save it with 8 or 16")
        image = Image.fromarray((wide.astype(np.uint16) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    image = image.convert("RGB")
    return image if transpose is None else image.transpose(transpose)


def _broken_image(data: bytes, name: str, error: Exception) -> BrokenImage:
    if not data:
        return BrokenImage(f"{name}: the file is empty")
    if isinstance(error, Image.UnidentifiedImageError):
        return BrokenImage(f"{name}: not an image, or of an unknown format")
    return BrokenImage(f"{name}: {error}")
