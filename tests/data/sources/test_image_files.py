"""Image files of every kind: decoded to upright RGB, and encoded for a .beton."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from kilobatch.data.sources import image_files
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import BrokenImage, encode_file, listening_to_pillow, read_image
from kilobatch.data.sources.memory_budget import MemoryBudget


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth colours, so that JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def difference(a: NDArray, b: NDArray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(float) - b).mean())


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotated_jpeg_is_upright(orientation: int):
    data = file_of(Image.fromarray(photo(70, 100)), "JPEG", exif=exif(orientation), quality=95)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(read_image(data, "a"), upright)
    kept = encode_file(data, "a", Encoding(quality=95))
    assert (kept.height, kept.width) == upright.shape[:2]
    assert difference(read_image(kept.data, "a"), upright) < 2
    assert (kept.data == data) == (orientation == 1)


def test_cmyk_jpeg_and_unreadable_exif():
    rgb = photo(80, 90)
    cmyk = file_of(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=98)
    assert difference(read_image(cmyk, "a"), rgb) < 3
    assert Image.open(io.BytesIO(encode_file(cmyk, "a", Encoding(quality=95)).data)).mode == "RGB"
    garbled = file_of(Image.fromarray(rgb), "JPEG", exif=b"Exif\0\0nonsense", quality=98)
    assert difference(read_image(garbled, "a"), rgb) < 3


def test_grey_palette_transparent_and_16_bit():
    grey = photo(9, 12)[..., 0]
    assert (read_image(file_of(Image.fromarray(grey), "PNG"), "a") == grey[..., None]).all()
    assert (read_image(file_of(Image.fromarray(grey > 99), "PNG"), "a") == np.where(grey > 99, 255, 0)[..., None]).all()
    wide = np.arange(9 * 12, dtype=np.uint16).reshape(9, 12) * 607
    assert (read_image(file_of(Image.fromarray(wide), "PNG"), "a") == np.round(wide / 257)[..., None]).all()
    rgba = np.dstack([photo(9, 12), np.where(grey > 99, 255, 0).astype(np.uint8)])
    white = np.where(rgba[..., 3:] == 255, rgba[..., :3], 255)
    assert (read_image(file_of(Image.fromarray(rgba), "PNG"), "a") == white).all()
    palette = Image.fromarray(np.tile(np.arange(3, dtype=np.uint8), (4, 1)), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    seen = read_image(file_of(palette, "PNG", transparency=1), "a")
    np.testing.assert_array_equal(seen[0], [[255, 0, 0], [255, 255, 255], [0, 0, 255]])


def test_first_picture_of_a_gif_and_other_formats():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    gif = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (read_image(gif, "a") == (255, 0, 0)).all()
    rgb = photo(20, 30)
    for kind, options in (("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        np.testing.assert_array_equal(read_image(file_of(Image.fromarray(rgb), kind, **options), "a"), rgb)


def test_what_is_kept_and_what_is_encoded_anew():
    image = Image.fromarray(photo(100, 120))
    plain = file_of(image, "JPEG")
    assert encode_file(plain, "a", Encoding(120, quality=90)).data == plain
    assert encode_file(file_of(image.convert("L"), "JPEG"), "a", Encoding()).data == file_of(image.convert("L"), "JPEG")
    progressive = file_of(image, "JPEG", progressive=True)
    assert encode_file(progressive, "a", Encoding(quality=90)).data != progressive
    half = encode_file(plain, "a", Encoding(60, quality=90))
    assert (half.mode, half.width, half.height, len(half.data)) == (1, 60, 50, 60 * 50 * 3)
    dot = encode_file(file_of(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), "a", Encoding())
    assert (dot.mode, dot.data) == (1, bytes([1, 2, 3]))
    assert encode_file(file_of(Image.new("RGB", (900, 1)), "PNG"), "a", Encoding(100)).height == 1


def test_downscaling_through_the_jpeg_decoder_stays_near_lanczos():
    image = Image.fromarray(photo(1000, 1400))
    data = file_of(image, "JPEG", quality=95)
    exact = np.asarray(image.resize((140, 100), Image.Resampling.LANCZOS))
    assert difference(read_image(encode_file(data, "a", Encoding(140, quality=95)).data, "a"), exact) < 2


JPEG = file_of(Image.fromarray(photo(90, 90)), "JPEG")
PNG = file_of(Image.fromarray(photo(90, 90)), "PNG")
BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"<html>404 not found</html>", "not an image"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "Premature end"),
    "a JPEG's start": (JPEG[:30], ""),
    "half a PNG": (PNG[: len(PNG) // 2], ""),
    "damaged PNG": (PNG[:80] + b"\0" * 40 + PNG[120:], ""),
    "half a GIF": (file_of(Image.fromarray(photo(90, 90)), "GIF")[:900], ""),
    "float TIFF": (file_of(Image.fromarray(photo(9, 9)[..., 0].astype(np.float32)), "TIFF"), "floating-point"),
    "huge PNG": (file_of(Image.new("1", (66_000, 70)), "PNG"), "--max-side"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_images_are_named(case: str):
    data, reason = BROKEN[case]
    with pytest.raises(BrokenImage, match="cats/a.jpg: ") as caught:
        encode_file(data, str(Path("cats/a.jpg")), Encoding())
    assert reason in str(caught.value)
    if case != "huge PNG":
        with pytest.raises(BrokenImage, match="cats/a.jpg: "):
            read_image(data, "cats/a.jpg")


def test_damage_that_pillow_does_not_tell():
    """libjpeg warns of corrupt data, in colour and in CMYK, whether the file would be kept or encoded anew."""
    for mode in ("RGB", "CMYK"):
        data = file_of(Image.fromarray(photo(300, 400)).convert(mode), "JPEG", quality=92)
        half, end = len(data) // 2, len(data) * 3 // 4
        ruined = data[:half] + bytes(end - half) + data[end:]
        Image.open(io.BytesIO(ruined)).load()
        for encoding in (Encoding(), Encoding(100)):
            encode_file(data, "a.jpg", encoding)
            with pytest.raises(BrokenImage, match=r"a\.jpg: .*[Cc]orrupt"):
                encode_file(ruined, "a.jpg", encoding)


def test_pillows_warnings_are_kept_with_the_name():
    cut = exif(6).tobytes()[:-4]
    data = file_of(Image.fromarray(photo(90, 90)), "JPEG", exif=cut)
    with listening_to_pillow():
        encoded = encode_file(data, "cats/a.jpg", Encoding())
        assert encoded.warning is not None and encoded.warning.startswith("cats/a.jpg: ")
        assert encode_file(JPEG, "b.jpg", Encoding()).warning is None


def test_large_images_are_no_bombs_and_wait_for_each_other(monkeypatch: pytest.MonkeyPatch):
    """With room for one of them, eight threads hold one decoded image at a time; a larger one than all room passes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(image_files, "BUDGET", MemoryBudget(1000))
    held: list[int] = []
    data = file_of(Image.fromarray(photo(300, 200)), "PNG")
    resize = image_files._encode_rgb

    def encode_rgb(*arguments: Any) -> image_files.EncodedImage:
        held.append(image_files.BUDGET.used)
        return resize(*arguments)

    monkeypatch.setattr(image_files, "_encode_rgb", encode_rgb)
    with listening_to_pillow(), ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: encode_file(data, name, Encoding(100)), "abcdefgh"))
    assert {(image.width, image.height, image.warning) for image in found} == {(67, 100, None)}
    assert held == [4 * 300 * 200] * 8 and image_files.BUDGET.used == 0
    assert Image.MAX_IMAGE_PIXELS == 100
