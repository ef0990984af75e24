"""Damaged image files are refused by name, or are what they were: a cut at any place, and damage that Pillow hides."""

import contextlib
import io
import random

import pytest
from PIL import Image

from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import BrokenImage, encode_file, listening_to_pillow, read_image
from tests.data.sources.test_formats import file_of, kinds, photo, zeroed

RANGE = Encoding(value_range=(0, 4095))
TAKEN = [name for name in kinds() if not name.startswith(("cut", "zeroed", "damaged", "page", "nothing", "Thumbs"))]
IMAGES = [name for name in TAKEN if name.rpartition(".")[2] not in ("svg", "pdf", "eps", "npy")]
SEED = 12


@pytest.mark.parametrize("name", IMAGES)
def test_a_cut_at_any_place(name: str):
    data = kinds()[name][1]
    whole, choice = encode_file(data, name, RANGE), random.Random(SEED)
    with listening_to_pillow():
        for part in range(15):
            cut = data[: int(len(data) * (part + choice.random()) / 15)]
            try:
                encoded = encode_file(cut, name, RANGE)
            except BrokenImage as error:
                assert str(error).startswith(f"{name}: ")
            else:  # of a second picture, or of what stands behind the pixels
                assert encoded.data == whole.data or (
                    data.startswith(encoded.data) and encoded.data.endswith(b"\xff\xd9")
                )


def test_pixels_of_a_png_that_still_inflate_after_damage():
    """Pillow reads no checksum of the pixels' chunks, and zlib's only where it comes before the last row."""
    data = file_of("PNG")
    pixels, silent = read_image(data, "a"), 0
    for at in range(data.index(b"IDAT") + 4, len(data) - 20, 7):
        flipped = data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
        with contextlib.suppress(BrokenImage):
            silent += not (read_image(flipped, "a") == pixels).all()
        with pytest.raises(BrokenImage, match="^a: "):
            encode_file(flipped, "a", Encoding())
    assert silent  # else there would be nothing to find


def test_a_tiff_of_damaged_jpegs():
    """Neither libtiff nor Pillow tells libjpeg's warnings."""
    data = file_of("TIFF", photo(400, 300), compression="jpeg", quality=92)
    with Image.open(io.BytesIO(data)) as image:
        start, size = image.tag_v2[273][0], image.tag_v2[279][0]  # pyright: ignore[reportAttributeAccessIssue]
    encode_file(data, "a", Encoding())
    damaged = data[:start] + zeroed(data[start : start + size]) + data[start + size :]
    assert not (read_image(damaged, "a") == read_image(data, "a")).all()
    with pytest.raises(BrokenImage, match="^a: Corrupt JPEG data"):
        encode_file(damaged, "a", Encoding())
