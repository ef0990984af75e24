"""Damaged image files are refused by name, or are what they were: a cut at any place, and damage that Pillow hides."""

import contextlib
import io
import random
from typing import Literal

import pytest
from PIL import Image

from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import BrokenImage, encode_file, listening_to_pillow, read_image
from tests.data.sources.test_formats import file_of, kinds, photo, zeroed

RANGE = Encoding(value_range=(0, 4095))
TAKEN = [
    name
    for name in kinds()
    if not name.startswith(("cut", "zeroed", "damaged", "page", "nothing", "Thumbs", "rgb16.j"))
]
IMAGES = [name for name in TAKEN if name.rpartition(".")[2] not in ("svg", "pdf", "eps", "npy", "nef")]
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
                assert str(error).startswith(f"{name}: ") and len(str(error)) > len(f"{name}: ")
                assert str(error).isprintable()
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


def strip_of(data: bytes) -> tuple[int, int]:
    """Where the first strip of a TIFF begins and ends."""
    with Image.open(io.BytesIO(data)) as image:
        fields = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    return fields[273][0], fields[273][0] + fields[279][0]


def silent_flips(data: bytes, step: int) -> list[int]:
    """Places in a TIFF's pixels where a flipped bit shows another image and is not refused."""
    whole, silent = read_image(data, "a"), []
    with listening_to_pillow():
        for at in range(*strip_of(data), step):
            flipped = data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
            with contextlib.suppress(BrokenImage):
                encode_file(flipped, "a", Encoding())
                if not (read_image(flipped, "a") == whole).all():
                    silent.append(at)
    return silent


def test_a_tiff_whose_zlib_data_still_inflate():
    """libtiff stops at the last pixel, often before the checksum."""
    noise = Image.effect_noise((120, 100), 90).convert("RGB")
    assert not silent_flips(file_of("TIFF", noise, compression="tiff_adobe_deflate"), 71)
    assert not silent_flips(file_of("TIFF", noise, compression="tiff_deflate"), 71)


@pytest.mark.parametrize("compression", ["group4", "tiff_ccitt"])
def test_a_fax_of_which_libtiff_says_that_it_is_damaged(compression: str, capfd: pytest.CaptureFixture[str]):
    """Pillow hears neither libtiff's errors nor its warnings; without a handler the errors go to stderr."""
    data = file_of("TIFF", Image.effect_noise((120, 100), 90).convert("1"), compression=compression)
    places = range(*strip_of(data), 31)
    assert len(silent_flips(data, 31)) <= 0.15 * len(places)  # code words that are right, of other pixels
    flipped = data[: places[9]] + bytes([data[places[9]] ^ 16]) + data[places[9] + 1 :]
    with listening_to_pillow():
        with pytest.raises(BrokenImage, match="^a: Fax"):
            encode_file(flipped, "a", Encoding())
        with pytest.raises(BrokenImage, match="^a: Fax4Decode: Premature EOL at line"):
            encode_file(kinds()["damaged.tif"][1], "a", Encoding())
        with pytest.raises(BrokenImage, match="^a: LZMADecode: "):
            encode_file(zeroed(file_of("TIFF", compression="lzma")), "a", Encoding())
    assert capfd.readouterr().err == ""


def test_a_tiff_that_does_not_say_where_its_pixels_are():
    data = file_of("TIFF", compression="jpeg")
    field = b"\x17\x01\x04\0" if b"\x17\x01\x04\0" in data else b"\x17\x01\x03\0"  # the strips' sizes
    with listening_to_pillow(), pytest.raises(BrokenImage, match="^a: its data are damaged: it does not say where"):
        encode_file(data.replace(field, b"\x18\x01" + field[2:]), "a", Encoding())


def test_an_exif_block_that_is_cut_short_is_no_damage():
    """It says nothing of the pixels; the file is kept, with a warning."""
    block = Image.Exif()
    block[0x010F] = "a maker of cameras"
    data = file_of("JPEG", exif=block)
    order: Literal["little", "big"] = "little" if b"II*\0" in data else "big"
    at = data.index(b"".join(number.to_bytes(2, order) for number in (0x010F, 2)))  # the field, a text
    cut = data[: at + 8] + (1000).to_bytes(4, order) + data[at + 12 :]  # where the maker's name would stand
    with listening_to_pillow():
        encoded = encode_file(cut, "a", Encoding())
    assert encoded.data == cut and encoded.warning == "a: Truncated File Read"
