"""Kinds of image file: docs/formats.md says what happens to each, and is what a conversion of them does.

WRITE_FORMATS=1 python -m pytest tests/data/sources/test_formats.py     writes docs/formats.md anew
"""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kilobatch.data.beton import read_names
from kilobatch.data.errors import UserError
from kilobatch.data.sources import formats
from kilobatch.data.sources.convert import convert, describe
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.image_files import BrokenImage, encode_file
from tests.data.sources.test_deep_pixels import fits, jpeg2000
from tests.helpers.beton_contents import stored_files
from tests.helpers.deep_images import png_16, tiff_16

pytest.importorskip("pillow_heif")

DOCUMENT = Path(__file__).parents[3] / "docs" / "formats.md"
INTRODUCTION = """# What happens to each kind of image file

`kilobatch convert folder:…`, and training on `folder:…`, try every file by its content; its name says nothing but how
it is counted. This table is made by `tests/data/sources/test_formats.py`, which converts one file of each kind. "Kept"
is byte for byte; "JPEG" is encoded anew (`--quality`), upright and in RGB; images of up to 64 pixels become plain
pixels. A broken file is refused by name, with the reason; `--skip-broken` leaves it out and counts it. What is passed
over is counted by reason. Of several pictures in a file the first is taken. Transparent parts become white.

| file | what it is | what happens |
|---|---|---|
"""


def photo(width: int = 90, height: int = 80) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def file_of(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or photo()).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def zeroed(data: bytes) -> bytes:
    half, end = len(data) // 2, len(data) * 3 // 4
    return data[:half] + bytes(end - half) + data[end:]


def tiffs() -> dict[str, tuple[str, bytes]]:
    deep = np.random.default_rng(0).integers(0, 4096, (80, 90, 3), np.uint16)
    fax = file_of("TIFF", photo(400, 300).convert("1"), compression="group4")
    return {
        "rgb.tif": ("TIFF", file_of("TIFF")),
        "lzw.tif": (
            "TIFF, LZW, two pages",
            file_of("TIFF", compression="tiff_lzw", save_all=True, append_images=[photo()]),
        ),
        "cmyk.tif": ("TIFF, CMYK", file_of("TIFF", photo().convert("CMYK"))),
        "rgb16.tif": ("TIFF, RGB, 16 bits", tiff_16(deep, "<")),
        "float.tif": ("TIFF, floating-point, without --range", file_of("TIFF", photo().convert("F"))),
        "fax.tif": ("TIFF, fax (CCITT group 4)", fax),
        "damaged.tif": ("TIFF, fax, a quarter of its bytes zero", zeroed(fax)),
        "raw.nef": ("raw file of a camera, with a preview", file_of("TIFF", tiffinfo={254: 1})),
    }


def kinds() -> dict[str, tuple[str, bytes]]:
    """Name of the file -> what it is, its bytes."""
    jpeg, png = file_of("JPEG"), file_of("PNG")
    deep = np.random.default_rng(0).integers(0, 4096, (80, 90, 3), np.uint16)
    rgba = photo().convert("RGBA")
    rgba.putalpha(128)
    return {
        "420.jpg": ("JPEG, baseline", jpeg),
        "444.jpg": ("JPEG, colours not subsampled", file_of("JPEG", subsampling=0)),
        "grey.jpg": ("JPEG, grey", file_of("JPEG", photo().convert("L"))),
        "progressive.jpg": ("JPEG, progressive", file_of("JPEG", progressive=True)),
        "cmyk.jpg": ("JPEG, CMYK", file_of("JPEG", photo().convert("CMYK"))),
        "turned.jpg": ("JPEG, turned by its EXIF", file_of("JPEG", exif=exif(6))),
        "exif.jpg": ("JPEG with an unreadable EXIF block", file_of("JPEG", exif=b"Exif\0\0nonsense")),
        "trailer.jpg": ("JPEG with other bytes after its end", jpeg + b"other bytes"),
        "pictures.mpo": ("MPO, two pictures", file_of("MPO", save_all=True, append_images=[photo(91)])),
        "suffix.jpe": ("JPEG with a rare suffix", jpeg),
        "bare": ("JPEG without a suffix", jpeg),
        "wrong.png": ("JPEG that is called PNG", jpeg),
        "text.txt": ("JPEG that is called a text", jpeg),
        "cut.jpg": ("JPEG, cut short", jpeg[: len(jpeg) // 2]),
        "zeroed.jpg": ("JPEG, a quarter of its bytes zero", zeroed(file_of("JPEG", photo(400, 300), quality=92))),
        "small.png": ("PNG of 32 pixels", file_of("PNG", photo(32, 32))),
        "rgb.png": ("PNG, RGB", png),
        "bit.png": ("PNG, one bit", file_of("PNG", photo().convert("1"))),
        "palette.png": ("PNG, palette with a transparent colour", file_of("PNG", photo().convert("P"), transparency=1)),
        "rgba.png": ("PNG, RGB with opacity", file_of("PNG", rgba)),
        "grey16.png": ("PNG, grey, 16 bits", png_16(deep[..., 0])),
        "rgb16.png": ("PNG, RGB, 16 bits", png_16(deep)),
        "cut.png": ("PNG, cut short", png[: len(png) // 2]),
        "damaged.png": ("PNG with a wrong checksum", png[:90] + bytes(8) + png[98:]),
        "animated.gif": ("GIF, animated", file_of("GIF", save_all=True, append_images=[photo(91).resize((90, 80))])),
        "lossy.webp": ("WebP", file_of("WEBP")),
        "lossless.webp": ("WebP, lossless", file_of("WEBP", lossless=True)),
        "a.avif": ("AVIF", file_of("AVIF")),
        "a.heic": ("HEIC, with pillow-heif installed", file_of("HEIF")),
        "a.jp2": ("JPEG 2000", file_of("JPEG2000")),
        "grey16.jp2": ("JPEG 2000, grey, 16 bits", file_of("JPEG2000", Image.fromarray(deep[..., 0]))),
        "rgb16.j2k": ("JPEG 2000, RGB, 16 bits", jpeg2000(photo(), 16)),
        **tiffs(),
        "a.fits": ("FITS, 16 bits", fits(deep[..., 0].astype(np.int16))),
        "a.bmp": ("BMP", file_of("BMP")),
        "a.tga": ("TGA", file_of("TGA")),
        "a.ppm": ("PPM", file_of("PPM")),
        "a.ico": ("ICO", file_of("ICO", sizes=[(48, 48)])),
        "a.dds": ("DDS", file_of("DDS")),
        "a.svg": ("SVG", b'<svg xmlns="http://www.w3.org/2000/svg"/>'),
        "a.pdf": ("PDF", file_of("PDF")),
        "a.eps": ("EPS", file_of("EPS")),
        "a.npy": ("NumPy's array", b"\x93NUMPY\1\0v\0" + bytes(300)),
        "page.jpg": ("HTML that is called JPEG", b"<html>404 not found</html>"),
        "nothing.jpg": ("empty file that is called JPEG", b""),
        "nothing": ("empty file without a suffix", b""),
        ".hidden.jpg": ("JPEG whose name begins with a dot", jpeg),
        "Thumbs.db": ("Windows' thumbnails", b"\xd0\xcf\x11\xe0" + bytes(60)),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in" / "all").mkdir(parents=True)
    for name, (_, data) in kinds().items():
        (tmp_path / "in" / "all" / name).write_bytes(data)
    return tmp_path / "in"


def fates(folder: Path, out: Path) -> dict[str, str]:
    """What a conversion does to each file."""
    source = Folder(folder, "train")
    info = convert(source, out, skip_broken=True, progress=False)
    stored = dict(zip(read_names(out), stored_files(out), strict=True))
    broken = {Path(text.partition(": ")[0]).name for text in info.skipped}
    warned = {Path(text.partition(": ")[0]).name for text in info.warned}
    fate: dict[str, str] = {}
    for name in kinds():
        if f"all/{name}" in stored:
            mode, _, _, data = stored[f"all/{name}"]
            original = (folder / "all" / name).read_bytes()
            kept = mode == 0 and original.startswith(data)
            fate[name] = "pixels" if mode == 1 else "kept" if kept else "JPEG"
            fate[name] += ", with a warning" if name in warned else ""
        elif name in broken:
            fate[name] = "refused as broken"
        else:
            alone = folder.parent / f"alone-{name}" / "all"
            alone.mkdir(parents=True)
            (alone / name).write_bytes((folder / "all" / name).read_bytes())
            (alone / "other.jpg").write_bytes(kinds()["420.jpg"][1])
            fate[name] = f"passed over: {next(iter(Folder(alone.parent, 'train').passed_over))}"
    assert info.samples + len(info.skipped) + sum(info.passed_over.values()) == len(kinds())
    assert f"of {len(kinds())} files" in describe(info)
    return fate


def test_the_table_in_the_documents_is_what_happens(folder: Path, tmp_path: Path):
    fate = fates(folder, tmp_path / "a.beton")
    table = "".join(f"| `{name}` | {what} | {fate[name]} |\n" for name, (what, _) in kinds().items())
    if os.environ.get("WRITE_FORMATS"):
        DOCUMENT.write_text(INTRODUCTION + table)
    assert DOCUMENT.read_text() == INTRODUCTION + table


def test_a_damaged_heic_is_not_said_to_need_what_is_installed(folder: Path):
    heic = kinds()["a.heic"][1]
    with pytest.raises(BrokenImage) as refusal:
        encode_file(heic[:100] + bytes(len(heic) - 100), "a", Encoding())
    assert "pip install" not in str(refusal.value)
    (folder / "all" / "damaged").write_bytes(heic[:12] + bytes(400))
    assert formats.recognise(folder / "all" / "damaged") == "not images (no suffix)"


def test_heic_is_counted_where_nothing_reads_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "FORMATS", tuple(kind for kind in formats.FORMATS if kind != "HEIF"))
    assert formats.recognise(folder / "all" / "a.heic") == formats.HEIC_HINT
    assert formats.recognise(folder / "all" / "a.avif") is None
    (folder / "all" / "phone.jpg").write_bytes((folder / "all" / "a.heic").read_bytes())
    with pytest.raises(UserError, match=r"phone\.jpg: .*HEIC images \(to read them: pip install pillow-heif\)"):
        convert(Folder(folder, "train"), folder / "a.beton", encoding=Encoding(value_range=(0, 1)), progress=False)
