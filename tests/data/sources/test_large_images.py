"""Large images: shrunk in little memory to what they are when decoded whole; none is refused for its size alone."""

import io
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kilobatch.data.sources import image_files, png_chunks
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.image_files import BrokenImage, encode_file, read_image
from kilobatch.data.sources.memory_budget import MemoryBudget
from tests.data.sources.test_image_files import difference, exif, file_of, photo
from tests.helpers.deep_images import png_of

MEMORY = """
import resource
from pathlib import Path
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.folder import Folder
for name in ("small", "large"):
    convert(Folder(Path(name), "train"), Path(f"{name}.beton"), encoding=Encoding(512), progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def large(mode: str, **options: object) -> bytes:
    """A PNG, 500 by 407, of a mode in Pillow."""
    image = Image.fromarray(photo(407, 500))
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(photo(407, 500, 1)[..., 0]))
    return file_of(image.convert(mode), "PNG", **options)


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(png_chunks, "LARGE", 500_000)
    monkeypatch.setattr(png_chunks, "PIECE", 700)
    monkeypatch.setattr(image_files, "BAND", 100_000)


@pytest.mark.usefixtures("small_bands")
@pytest.mark.parametrize(
    ("mode", "options"), [(m, {}) for m in ("L", "LA", "RGB", "RGBA")] + [("P", {"transparency": 3})]
)
def test_bands_are_the_picture(mode: str, options: dict[str, int]):
    data = large(mode, **options)
    whole = Image.open(io.BytesIO(data))
    assert png_chunks.has_rows_for_bands(whole)
    parts = list(png_chunks.bands(data, 100))
    assert [part.height for part in parts] == [100, 100, 100, 100, 7]
    pixels = np.concatenate([np.asarray(part.convert("RGBA")) for part in parts])
    np.testing.assert_array_equal(pixels, np.asarray(whole.convert("RGBA")))


def test_a_png_in_bands_becomes_what_it_becomes_whole(request: pytest.FixtureRequest):
    """Its orientation, too, which may stand behind the pixels."""
    files = [large("RGBA"), large("RGB", exif=exif(6)), large("P", transparency=3)]
    whole = [encode_file(data, "a", Encoding(100)) for data in files]
    request.getfixturevalue("small_bands")
    in_bands = [encode_file(data, "a", Encoding(100)) for data in files]
    assert (
        [(a.width, a.height) for a in whole]
        == [(a.width, a.height) for a in in_bands]
        == [(100, 81), (81, 100), (100, 81)]
    )
    for a, b in zip(whole, in_bands, strict=True):
        assert difference(read_image(a.data, "a"), read_image(b.data, "a")) < 1


@pytest.mark.usefixtures("small_bands")
def test_a_large_png_that_is_damaged():
    data = large("RGB")
    assert encode_file(data, "a", Encoding(100)).width == 100
    for at in range(60, len(data) - 30, len(data) // 40):
        for broken in (data[:at], data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]):
            with pytest.raises(BrokenImage, match="^a: "):
                encode_file(broken, "a", Encoding(100))


def test_memory_stays_small(tmp_path: Path):
    """Of 10,000 by 10,000 pixels, which Pillow holds in 400 MB, those of a palette in 100."""
    for name, side in (("small", 700), ("large", 10_000)):
        (tmp_path / name / "a").mkdir(parents=True)
        row = b"\1" + bytes(range(1, 31)) * (side // 10)  # differences to the pixel on the left
        (tmp_path / name / "a" / "a.png").write_bytes(png_of(side, side, 8, 2, zlib.compress(row * side, 1)))
        Image.new("P", (side, side)).save(tmp_path / name / "a" / "b.gif")
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    small, most = map(int, done.stdout.split())
    assert most < small + 150, done.stderr


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [("GIF", "P", {"transparency": 3}), ("TIFF", "1", {}), ("TIFF", "CMYK", {}), ("WEBP", "RGBA", {"lossless": True})],
)
def test_what_is_decoded_whole_is_shrunk_a_few_rows_at_a_time(
    kind: str, mode: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    image = Image.fromarray(photo(407, 500))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(photo(407, 500, 1)[..., 0]))
    data = file_of(image.convert(mode), kind, **options)
    whole = encode_file(data, "a", Encoding(60))
    assert (
        difference(read_image(data, "a").mean((0, 1)), np.frombuffer(whole.data, np.uint8).reshape(-1, 3).mean(0)) < 1
    )
    monkeypatch.setattr(image_files, "BAND", 30_000)
    assert encode_file(data, "a", Encoding(60)) == whole


def test_no_size_is_taken_for_an_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "a.png").write_bytes(large("RGB"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    info = convert(Folder(tmp_path / "in", "train"), tmp_path / "a.beton", encoding=Encoding(100), progress=False)
    assert (info.samples, info.warned, Image.MAX_IMAGE_PIXELS) == (1, [], 1000)


BOMBS = """
import io, resource
from PIL import Image
from kilobatch.data.sources.deep_pixels import values_of
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import BrokenImage, encode_file, listening_to_pillow
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
deep = bytes.fromhex("4949 2a00 0800 0000 0500 0001 0400 0100 0000 400d0300 0101 0400 0100 0000 400d0300"
    "0201 0300 0100 0000 10000000 0601 0300 0100 0000 01000000 1101 0400 0100 0000 08000000 00000000")
with listening_to_pillow():
    for name, data in (("a.ppm", b"P6 200000 200000 255 " + bytes(99)), ("a.tif", deep)):
        try:
            encode_file(data, name, Encoding(512, value_range=(0, 4095)))
        except BrokenImage as error:
            print(error)
    print(values_of(deep))
"""


def test_a_header_that_asks_for_more_than_all_memory():
    """One flipped bit may do so; the file is named, and can be left out."""
    done = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, timeout=120)
    said = "memory does not hold its 200,000 x 200,000 pixels; its header may be damaged"
    assert done.stdout.splitlines() == [f"a.ppm: {said}", f"a.tif: {said}", "None"], done.stderr


def test_threads_hold_no_more_than_the_budget():
    """An image that is larger than all of it is held alone."""
    budget, most = MemoryBudget(100), []

    def task(size: int) -> None:
        with budget.of(size):
            most.append(budget.used if size <= 100 else budget.used - size)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(task, [60, 30, 500, 40, 70, 10, 120, 90] * 20))
    assert len(most) == 160 and max(most) <= 100 and budget.used == 0
