"""Images of more than 8 bits: read in full, their range measured over all files, or given."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kilobatch.data.errors import UserError
from kilobatch.data.sources.convert import convert, describe
from kilobatch.data.sources.deep_pixels import UnknownRangeError, range_of_bits, read_deep, values_of
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.image_files import BrokenImage, encode_file, read_image
from tests.helpers.beton_contents import stored_pixels
from tests.helpers.deep_images import netpbm_16, png_16, sgi_16, tiff_16


def values(*shape: int, high: int = 65_535) -> NDArray[np.uint16]:
    return np.random.default_rng(sum(shape)).integers(0, high, shape, np.uint16, endpoint=True)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_is_read_to_the_last_bit(channels: int):
    pixels = values(7, 9, channels) if channels > 1 else values(7, 9)
    np.testing.assert_array_equal(read_deep(png_16(pixels)).values, pixels)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_in_colour_is_read_to_the_last_bit(order: str, separate: bool):
    pixels = values(7, 9, 3)
    data = tiff_16(pixels, order, separate=separate)
    np.testing.assert_array_equal(read_deep(data).values, pixels)
    assert values_of(data) == (pixels.min(), pixels.max())
    np.testing.assert_array_equal(read_image(data, "a"), np.round(pixels / 257))


def test_separate_planes_that_are_not_read_are_refused():
    """Pillow would show the high bytes twice."""
    data = bytearray(tiff_16(values(7, 9, 3), separate=True))
    at = data.index(b"\x03\x01\x03\0\x01\0\0\0\x01\0")  # the field of the compression
    data[at + 8] = 5  # LZW
    with pytest.raises(BrokenImage, match="a: its channels of more than 8 bits stand in separate planes.*interleaved"):
        encode_file(bytes(data), "a", Encoding(value_range=(0, 4095)))


def test_opacity_is_no_part_of_the_range():
    """Colours that are stored multiplied with their opacity are divided by it; on white they are what they were."""
    colours, opacity = values(7, 9, 3, high=4095).astype(float), 5 * values(7, 9, 1, high=13_107)
    plain = np.concatenate([colours, opacity], 2).astype(np.uint16)
    multiplied = np.concatenate([(colours * opacity / 65_535).round(), opacity], 2).astype(np.uint16)
    on_white = (colours / 4095 * 255 * opacity + 255 * (65_535.0 - opacity)) / 65_535
    for data in (tiff_16(plain, extra=2), tiff_16(multiplied, extra=1), png_16(plain)):
        assert np.abs(read_image(data, "a", (0, 4095)) - on_white).max() < 1.6
    assert values_of(tiff_16(plain, extra=2)) == (colours.min(), colours.max())


def test_a_grey_tiff_whose_white_is_zero():
    """X-ray images; of 8 bits Pillow turns them, of 16 it does not."""
    pixels = np.array([[0, 1000, 4095]], np.uint16)
    grey = read_image(tiff_16(pixels, photometric=0), "a", (0, 4095))[0, :, 0]
    assert [*grey] == [255, 193, 0]
    assert values_of(tiff_16(pixels, photometric=0)) == (0, 4095)


def test_large_unsigned_numbers_are_not_taken_for_negative():
    pixels = np.array([[0, 3_000_000_000, 4_000_000_000]], np.uint32)
    assert values_of(tiff_16(pixels, photometric=1)) == (0, 4_000_000_000)
    np.testing.assert_array_equal(read_deep(tiff_16(pixels, photometric=1)).values, pixels)


@pytest.mark.parametrize("highest", [4095, 65_535])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("shape", [(7, 9), (7, 9, 3)])
def test_netpbm_is_read_as_it_is_stored(shape: tuple[int, ...], plain: bool, highest: int):
    """Pillow stretches its values to the highest that the header allows."""
    pixels = values(*shape, high=4000)
    data = netpbm_16(pixels, highest, plain=plain)
    np.testing.assert_array_equal(read_deep(data).values, pixels)
    with pytest.raises(BrokenImage):
        encode_file(data[:-9], "a", Encoding(value_range=(0, 4095)))


def test_sgi_is_read_to_the_last_bit():
    pixels = values(7, 9, 3)
    np.testing.assert_array_equal(read_deep(sgi_16(pixels)).values, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_upright_once(orientation: int):
    """Pillow turns TIFF files as it decodes them; separate planes are not decoded by Pillow."""
    pixels, block, file = values(7, 9, 3), Image.Exif(), io.BytesIO()
    block[0x0112] = orientation
    Image.fromarray(pixels[..., 0]).save(file, "TIFF", exif=block, compression="tiff_lzw")
    eight = Image.fromarray(np.round(pixels / 257).astype(np.uint8))
    eight.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(eight))
    np.testing.assert_array_equal(read_image(file.getvalue(), "a")[..., 0], upright[..., 0])
    rows, turned = struct.pack("<HHII", 278, 4, 1, 7), struct.pack("<HHII", 274, 3, 1, orientation)
    for separate in (False, True):
        data = tiff_16(pixels, separate=separate).replace(rows, turned)
        np.testing.assert_array_equal(read_image(data, "a"), upright)
        encoded = encode_file(data, "a", Encoding(value_range=(0, 65_535)))
        assert (encoded.data, encoded.height) == (upright.tobytes(), len(upright))


def jpeg2000(image: Image.Image, bits: int) -> bytes:
    """A codestream of Pillow whose header has another number of bits."""
    file = io.BytesIO()
    image.save(file, "JPEG2000", no_jp2=True)
    data = bytearray(file.getvalue())
    for channel in range(len(image.getbands())):
        data[42 + 3 * channel] = bits - 1
    return bytes(data)


def test_jpeg_2000_has_the_values_that_were_stored():
    """Pillow stretches 12 bits to 16, and cuts colours down to 8."""
    pixels = values(7, 9, high=4095)
    shifted = Image.fromarray(pixels + np.uint16(32_768 - 2048))  # half of the range is subtracted as it is encoded
    np.testing.assert_array_equal(read_deep(jpeg2000(shifted, 12)).values, pixels)
    np.testing.assert_array_equal(read_deep(jpeg2000(Image.fromarray(pixels), 16)).values, pixels)
    colour = Image.fromarray(values(7, 9, 3, high=255).astype(np.uint8))
    np.testing.assert_array_equal(read_image(jpeg2000(colour, 8), "a"), colour)
    for use in (lambda data: read_image(data, "a"), lambda data: encode_file(data, "a", Encoding())):
        with pytest.raises(BrokenImage, match="a: JPEG 2000 in colour .* with 8 bits, not 16: save it as PNG or TIFF"):
            use(jpeg2000(colour, 16))


def fits(pixels: np.ndarray, **cards: object) -> bytes:
    bits = 8 * pixels.dtype.itemsize * (-1 if pixels.dtype.kind == "f" else 1)
    cards = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": pixels.shape[1], "NAXIS2": pixels.shape[0]} | cards
    header = "".join(f"{key:<8}= {value!s:>20} / a comment".ljust(80) for key, value in cards.items()) + "END"
    data = pixels[::-1].astype(pixels.dtype.newbyteorder(">")).tobytes()
    return header.ljust(2880).encode() + data.ljust(-(-len(data) // 2880) * 2880, b"\0")


def test_fits_has_signed_numbers_that_its_header_shifts_and_scales():
    pixels = values(7, 9).astype(np.int64)
    shifted = (pixels - 32_768).astype(np.int16)
    np.testing.assert_array_equal(read_deep(fits(shifted, BZERO=32_768, BSCALE="1.0")).values, pixels)
    np.testing.assert_array_equal(read_deep(fits(shifted)).values, shifted)
    np.testing.assert_array_equal(read_deep(fits(2 * pixels.astype(np.int32), BSCALE=0.5)).values, pixels)
    np.testing.assert_array_equal(read_deep(fits(pixels.astype(np.float32), BZERO=3)).values, pixels + 3)
    assert values_of(fits(shifted)) == (shifted.min(), shifted.max())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_16_bits_becomes_white(channels: int):
    """Of 16 bits that differ in the low byte alone, one is the transparent colour."""
    pixels = np.full((2, 3, channels), 0x1234, np.uint16)
    pixels[0] = 0x1233
    data = png_16(pixels if channels > 1 else pixels[..., 0])
    key = struct.pack(">4sH", b"tRNS", 0x1234) if channels == 1 else struct.pack(">4s3H", b"tRNS", *[0x1234] * 3)
    chunk = struct.pack(">I", len(key) - 4) + key + struct.pack(">I", zlib.crc32(key))
    image = read_image(data[:33] + chunk + data[33:], "a")
    np.testing.assert_array_equal(image[:, 0, 0], [round(0x1233 / 257), 255])


@pytest.mark.parametrize(
    ("low", "high", "taken"),
    [(0, 200, (0, 255)), (3, 4011, (0, 4095)), (0, 4096, (0, 8191)), (9, 65_535, (0, 65_535)), (-5, 70, (-5, 70))],
)
def test_the_range_is_that_of_the_bits_in_use(low: float, high: float, taken: tuple[float, float]):
    assert range_of_bits(low, high) == taken


def test_the_range_is_measured_over_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Of two images the first has a tenth of the values: both are brought to 8 bits alike, and in colour as in grey."""
    (tmp_path / "in" / "cell").mkdir(parents=True)
    dark, bright = values(12, 10, 3, high=400), values(12, 10, high=4000)
    (tmp_path / "in" / "cell" / "0.png").write_bytes(png_16(dark))
    (tmp_path / "in" / "cell" / "1.png").write_bytes(png_16(bright))
    eight = values(12, 10, 3, high=255).astype(np.uint8)
    Image.fromarray(eight).save(tmp_path / "in" / "cell" / "2.png")
    info = convert(Folder(tmp_path / "in", "train"), tmp_path / "a.beton")
    assert info.value_range == (0, 4095)
    assert f"2 images have more than 8 bits a channel, with values from {min(dark.min(), bright.min())} to " in (
        capsys.readouterr().err
    )
    assert "values from 0 to 4,095 of images with more than 8 bits became 0 to 255" in describe(info)
    expected = [dark / 4095 * 255, np.repeat(bright[..., None], 3, 2) / 4095 * 255, eight]
    for stored, pixels in zip(stored_pixels(tmp_path / "a.beton"), expected, strict=True):
        np.testing.assert_array_equal(stored, np.round(pixels))


def test_a_range_that_is_given(tmp_path: Path):
    pixels = np.array([[0, 100, 200, 300, 60_000]], np.uint16)
    encoded = encode_file(png_16(pixels), "a", Encoding(value_range=(100, 300)))
    assert [*encoded.data[::3]] == [0, 0, 128, 255, 255]
    with pytest.raises(UnknownRangeError):
        encode_file(png_16(pixels), "a", Encoding())
    (tmp_path / "in" / "x").mkdir(parents=True)
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "in" / "x" / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: its pixels are floating-point numbers.*--range LOW,HIGH"):
        convert(Folder(tmp_path / "in", "train"), tmp_path / "a.beton", progress=False)
    convert(Folder(tmp_path / "in", "train"), tmp_path / "a.beton", encoding=Encoding(value_range=(0, 1)))
    assert [*next(iter(stored_pixels(tmp_path / "a.beton")))[0, :, 0]] == [0, 128, 255]


def test_a_damaged_file_does_not_set_the_range(tmp_path: Path):
    """Its pixels would still inflate, and one of noise would darken all others."""
    (tmp_path / "in" / "x").mkdir(parents=True)
    dark, loud = (png_16(values(7, 9, high=high)) for high in (4000, 65_535))
    (tmp_path / "in" / "x" / "0.png").write_bytes(dark)
    (tmp_path / "in" / "x" / "1.png").write_bytes(loud[:-16] + bytes([loud[-16] ^ 1]) + loud[-15:])  # of its checksum
    info = convert(Folder(tmp_path / "in", "train"), tmp_path / "a.beton", skip_broken=True, progress=False)
    assert (info.samples, info.value_range) == (1, (0, 4095))
