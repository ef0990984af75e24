"""Decodes an image file to upright RGB, and encodes it as a .beton stores it."""

import io
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin

from kilobatch.data.beton_writer import Writer
from kilobatch.data.errors import UserError
from kilobatch.data.sources.damage import is_whole_jpeg, refuse_damage
from kilobatch.data.sources.deep_pixels import UnknownRangeError, is_deep, read_deep, to_8_bits
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.formats import HEIC_HINT, is_unread_heic, may_exceed_memory, open_image
from kilobatch.data.sources.libtiff import hearing_errors
from kilobatch.data.sources.memory_budget import BUDGET, DEEP_BYTES
from kilobatch.data.sources.path_names import printable
from kilobatch.data.sources.png_chunks import bands, has_rows_for_bands, without_pixels

RAW_SIDE = 64  # up to this side pixels are stored as they are: decoding a JPEG would cost more than reading them
BAND = 1 << 22  # bytes of a large PNG's pixels that are decoded at once
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
    """An image as a .beton holds it. mode 0: data is a JPEG file; mode 1: RGB pixels, (height, width, 3) uint8.

    warning: what Pillow has to say of the file, such as unreadable EXIF; deep: it had more than 8 bits a channel.
    """

    mode: int
    width: int
    height: int
    data: bytes
    warning: str | None = None
    deep: bool = False


def read_image(data: bytes, name: str, value_range: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """Decodes an image file's first picture: upright RGB, (H, W, 3) uint8. Raises BrokenImage with `name` in it.

    value_range: of images with more than 8 bits, the values that become 0 and 255; None: 0 and 65,535.
    """
    _heard.messages, _heard.errors = [], []
    try:
        with open_image(io.BytesIO(data)) as image:
            return np.array(_upright_rgb(_load(image, data, value_range), _orientation(image)))
    except MemoryError:
        raise
    except Exception as error:  # on foreign bytes Pillow's decoders raise nearly anything
        raise _broken_image(data, name, error) from error


def encode_file(data: bytes, name: str, encoding: Encoding) -> EncodedImage:
    """Encodes an image file for a .beton: its first picture, upright and RGB, no larger than `encoding` says.

    A JPEG file that needs no change is kept byte for byte, others are encoded anew, small ones stored as pixels. Every
    byte is decoded, so that a broken file is found here. Raises BrokenImage with `name` in its text, and
    UnknownRangeError where an image has more than 8 bits and `encoding` has no range.
    """
    _heard.messages, _heard.errors = [], []
    width = height = 0
    try:
        with open_image(io.BytesIO(data)) as image:
            width, height = image.size
            encoded = _encode_opened(image, data, encoding)
            if image.format == "TIFF":  # whose directory says where the pixels are; elsewhere only EXIF is cut short
                _heard.errors += [message for message in _heard.messages if "truncated" in message.lower()]
    except UnknownRangeError:
        raise
    except MemoryError as error:
        if not may_exceed_memory(width, height):
            raise
        raise BrokenImage(
            f"{name}: memory does not hold its {width:,} x {height:,} pixels; its header may be damaged"
        ) from error
    except Exception as error:  # on foreign bytes Pillow's decoders raise nearly anything
        raise _broken_image(data, name, error) from error
    if _heard.errors:
        raise BrokenImage(f"{name}: {_heard.errors[0]}")
    return replace(encoded, warning=f"{name}: {_heard.messages[0]}") if _heard.messages else encoded


def _encode_opened(image: Image.Image, data: bytes, encoding: Encoding) -> EncodedImage:
    turbojpeg_reads_it = image.format in ("JPEG", "MPO") and is_whole_jpeg(data)
    refuse_damage(image, data)
    target = encoding.size(*image.size)
    if turbojpeg_reads_it and target == image.size and max(image.size) > RAW_SIDE and _can_keep(image, data):
        return EncodedImage(0, *image.size, data)
    if target != image.size:
        image.draft(None, (2 * target[0], 2 * target[1]))  # JPEG: decodes straight to a half, quarter or eighth
    factor = min(image.width // (2 * target[0]), image.height // (2 * target[1]))
    if factor > 1 and has_rows_for_bands(image):
        with BUDGET.of(8 * BAND), open_image(io.BytesIO(without_pixels(data))) as described:
            return _encode_upright(_reduced_png(data, factor), _orientation(described), target, encoding.quality)
    deep = is_deep(image)
    value_range = None if image.mode == "F" and encoding.measured else encoding.value_range
    if deep and value_range is None and image.mode != "F":
        raise UnknownRangeError
    with BUDGET.of((DEEP_BYTES if deep else 4) * image.width * image.height):
        loaded = _load(image, data, value_range)
        if factor > 1:  # before anything makes copies of it
            rows = _rows_at_once(loaded.width, factor)
            boxes = ((0, top, loaded.width, min(top + rows, loaded.height)) for top in range(0, loaded.height, rows))
            loaded = _reduced(map(loaded.crop, boxes), loaded.size, factor)
        # To look for a PNG's orientation decodes all of it, so it comes after the pixels.
        return replace(_encode_upright(loaded, _orientation(image), target, encoding.quality), deep=deep)


def _reduced_png(data: bytes, factor: int) -> Image.Image:
    """A large PNG in RGB, shrunk by a whole number, of which a few rows at a time are decoded."""
    with open_image(io.BytesIO(data)) as image:
        size = image.size
    return _reduced(bands(data, _rows_at_once(size[0], factor)), size, factor)


def _reduced(parts: Iterable[Image.Image], size: tuple[int, int], factor: int) -> Image.Image:
    """An image in RGB, shrunk by a whole number. parts: its rows from top to bottom, _rows_at_once in each but the
    last."""
    width, height = size
    reduced, top = Image.new("RGB", (-(-width // factor), -(-height // factor))), 0
    for part in parts:
        shrunk = _upright_rgb(part, 1).reduce(factor)
        reduced.paste(shrunk, (0, top))
        top += shrunk.height
    return reduced


def _rows_at_once(width: int, factor: int) -> int:
    return max(1, BAND // (4 * width * factor)) * factor


def _encode_upright(image: Image.Image, orientation: int, target: tuple[int, int], quality: int) -> EncodedImage:
    """target: size of the image before it is turned upright."""
    width, height = target
    size = (height, width) if orientation in (5, 6, 7, 8) else target
    return _encode_rgb(_upright_rgb(image, orientation), size, quality)


def encode(image: Image.Image, encoding: Encoding) -> EncodedImage:
    """Encodes an RGB image, downscaled (Lanczos) as `encoding` says: as pixels up to 64 on the longer side, else as
    JPEG, of which the decoder can leave out rows: each row of blocks begins with a restart marker."""
    return _encode_rgb(image, encoding.size(*image.size), encoding.quality)


def _encode_rgb(image: Image.Image, size: tuple[int, int], quality: int) -> EncodedImage:
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if max(image.size) <= RAW_SIDE:
        return EncodedImage(1, *image.size, image.tobytes())
    if max(image.size) > LONGEST:
        raise ValueError(f"{max(image.size):,} pixels on a side, the most is {LONGEST:,}: give a --max-side")
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, restart_marker_rows=1)
    if len(file.getvalue()) > Writer.PAGE:
        raise ValueError(f"{len(file.getvalue()):,} bytes as JPEG, the most is {Writer.PAGE:,}: give a --max-side")
    return EncodedImage(0, *image.size, file.getvalue())


def upright_pixels(image: Image.Image, encoding: Encoding) -> NDArray[np.uint8]:
    """The pixels of an image that Pillow has decoded: upright RGB, (H, W, 3), downscaled (Lanczos) as `encoding` says.
    Raises UnknownRangeError where it has more than 8 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise UnknownRangeError
    rgb = _upright_rgb(image, _orientation(image))
    size = encoding.size(*rgb.size)
    return np.array(rgb if size == rgb.size else rgb.resize(size, Image.Resampling.LANCZOS))


class _Heard(threading.local):
    """What Pillow has warned of in this thread; and the first error of libtiff, after which Pillow may go on."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.errors: list[str] = []


_heard = _Heard()


@contextmanager
def listening_to_pillow() -> Iterator[None]:
    """Has Pillow's warnings and libtiff's errors, in all threads, kept for the file that they are about, and lets
    Pillow open large images."""

    def hear(message: Warning | str, *_: object) -> None:
        _heard.messages.append(" ".join(str(message).split()))

    def hear_error(message: str) -> None:
        if not _heard.errors:  # a fax has one for each of its rows
            _heard.errors.append(message)

    most = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings(), hearing_errors(hear_error):
            warnings.simplefilter("always")
            warnings.showwarning = hear
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = most


def _can_keep(image: Image.Image, data: bytes) -> bool:
    """Whether FFCV's decoder (libturbojpeg) decodes this file as Pillow does, and as fast as any other."""
    if image.format != "JPEG" or len(data) > Writer.PAGE or image.info.get("progressive") or _orientation(image) != 1:
        return False
    if image.mode == "L":
        return True
    return image.mode == "RGB" and JpegImagePlugin.get_sampling(image) in (0, 1, 2)  # 4:4:4, 4:2:2, 4:2:0


def _orientation(image: Image.Image) -> int:
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow turns these itself, as it decodes them
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # an unreadable EXIF block is ignored, as viewers do; Pillow raises nearly anything
        return 1


def _load(image: Image.Image, data: bytes, value_range: tuple[float, float] | None) -> Image.Image:
    """The decoded image, with 8 bits a channel."""
    if is_deep(image):
        if value_range is None and image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range; give it with --range LOW,HIGH")
        return to_8_bits(read_deep(data), value_range or (0, 65_535))
    image.load()
    return image


def _upright_rgb(image: Image.Image, orientation: int) -> Image.Image:
    """Converts grey, palette and CMYK to RGB, and turns upright; transparent parts become white."""
    transpose = _TO_UPRIGHT.get(orientation)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image if transpose is None else image.transpose(transpose)


def _broken_image(data: bytes, name: str, error: Exception) -> BrokenImage:
    if not data:
        return BrokenImage(f"{name}: the file is empty")
    if isinstance(error, Image.UnidentifiedImageError):
        if is_unread_heic(data[:12]):
            return BrokenImage(f"{name}: it is one of the {HEIC_HINT}")
        return BrokenImage(f"{name}: not an image, or of an unknown format")
    reason = _heard.errors[0] if _heard.errors else str(error) or type(error).__name__  # "IndexError", for one
    return BrokenImage(f"{name}: {printable(' '.join(reason.split()))}")
