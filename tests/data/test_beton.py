"""Damaged and foreign .beton files: the quick check refuses each, with its name and the reason."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kilobatch.data.beton import HEADER, note_path, verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.specs import count_images


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    convert(Arrays(pixels, np.arange(30) % 2, ["cat", "dog"]), tmp_path / "a.beton", progress=False)
    return tmp_path / "a.beton"


def header(**values: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        row = np.frombuffer(data, HEADER, 1)
        for name, value in values.items():
            row[name] = value
        path.write_bytes(data)

    return damage


def note(**values: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads(note_path(path).read_text()) | values
        note_path(path).write_text(json.dumps(content))

    return damage


def flip(path: Path) -> None:
    """Flips one bit of the last image: the allocation table behind it has 30 rows of 24 bytes."""
    data = bytearray(path.read_bytes())
    data[-(30 * 24 + 5)] ^= 1
    path.write_bytes(data)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.rename(p.with_name("b.beton")), r"a\.beton does not exist; did you mean 'b\.beton'"),
    "folder": (as_folder, r"a\.beton is a folder, not a \.beton; .*folder:"),
    "empty": (lambda p: p.write_bytes(b""), r"a\.beton is empty.*kilobatch convert"),
    "too short": (lambda p: p.write_bytes(b"abc"), r"a\.beton is not a \.beton: it has 3 bytes.*kilobatch convert"),
    "text": (lambda p: p.write_text("text, no images\n" * 200), "does not begin with FFCV's header.*kilobatch convert"),
    "unfinished": (lambda p: p.write_bytes(b"\0" * 9000), "was never finished: its header is blank.*kilobatch"),
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-100]), r"is cut short: it has .* bytes.*convert it again"),
    "cut in its header": (lambda p: p.write_bytes(p.read_bytes()[:30]), "other fields.*kilobatch convert"),
    "grown": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "is not the file that was converted.*convert it again"),
    "version": (header(version=3), "FFCV version 3, this reads version 2.*kilobatch convert"),
    "fields": (header(num_fields=3), r"other fields than \(image.*kilobatch convert"),
    "samples": (header(num_samples=29), r"counts 29 samples, a\.beton\.json says 30.*convert it again"),
    "no table": (header(alloc_table_ptr=0), "does not point to its allocation table.*convert it again"),
    "no note": (lambda p: note_path(p).unlink(), r"has no a\.beton\.json beside it.*copied alone.*kilobatch convert"),
    "note is text": (lambda p: note_path(p).write_text("{"), r"a\.beton\.json is damaged: it is not JSON.*convert"),
    "note's format": (note(format=2), r"a\.beton\.json has format 2, this reads format 1.*kilobatch convert"),
    "note is a list": (lambda p: note_path(p).write_text("[]"), "has format None"),
    "note's fields": (note(samples="many"), r"a\.beton\.json is damaged: samples: .*integer.*kilobatch convert"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_quick_check_refuses(case: str, whole: Path):
    damage, message = DAMAGE[case]
    verify_beton(whole)
    damage(whole)
    for check in (verify_beton, lambda path: count_images(str(path), "train")):
        with pytest.raises(UserError, match=message):
            check(whole)


def test_full_check_finds_a_single_bit(whole: Path):
    info = verify_beton(whole, full=True)
    assert (info.samples, info.classes) == (30, ["cat", "dog"])
    flip(whole)
    verify_beton(whole)
    with pytest.raises(UserError, match=r"a\.beton is damaged: its SHA-256 is .*convert it again"):
        verify_beton(whole, full=True)
