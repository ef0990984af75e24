"""Images of more than 8 bits: read in full, their range measured over all files, or given."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from kilobatch.data.errors import UserError
from kilobatch.data.sources.convert import convert, describe
from kilobatch.data.sources.deep_pixels import UnknownRangeError, range_of_bits, read_deep, values_of
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.image_files import encode_file, read_image
from tests.helpers.deep_images import png_16, tiff_16
from tests.helpers.stored_images import stored_pixels


def values(*shape: int, high: int = 65_535) -> NDArray[np.uint16]:
    return np.random.default_rng(sum(shape)).integers(0, high, shape, np.uint16, endpoint=True)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_png_is_read_to_the_last_bit(channels: int):
    pixels = values(7, 9, channels) if channels > 1 else values(7, 9)
    np.testing.assert_array_equal(read_deep(png_16(pixels)), pixels)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_in_colour_is_read_to_the_last_bit(order: str):
    pixels = values(7, 9, 3)
    data = tiff_16(pixels, order)
    np.testing.assert_array_equal(read_deep(data), pixels)
    assert values_of(data) == (pixels.min(), pixels.max())
    np.testing.assert_array_equal(read_image(data, "a"), np.round(pixels / 257))


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
