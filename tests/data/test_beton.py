"""Damaged and foreign .beton files: the quick check refuses each, with its name and the reason."""

import json
import os
import zlib
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kilobatch.data import beton
from kilobatch.data.beton import verify_beton
from kilobatch.data.beton_layout import FIELD_TYPES, HEADER, IMAGE, INT, row_layout
from kilobatch.data.beton_note import names_path, note_path
from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.folder import Folder
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
    """Changes a note that was written so: its own checksum is right."""

    def damage(path: Path) -> None:
        content = json.loads(note_path(path).read_text()) | values
        del content["note_crc32"]
        body = json.dumps(content, indent=1).removeprefix("{\n").encode()
        note_path(path).write_bytes(b'{\n "note_crc32": "%08x",\n' % zlib.crc32(body) + body)

    return damage


def old_note(path: Path) -> None:
    """Writes the note as it was before there were checksums of tables and samples."""
    content = json.loads(note_path(path).read_text())
    kept = "samples", "classes", "bytes", "sha256", "alloc_table_ptr", "max_side", "quality", "skipped", "names_sha256"
    note_path(path).write_text(json.dumps({"format": 1, **{name: content[name] for name in kept}}, indent=1))


def replace(old: bytes, new: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = note_path(path).read_bytes()
        assert data.count(old) == 1
        note_path(path).write_bytes(data.replace(old, new))

    return damage


def flip(offset: int) -> Callable[[Path], None]:
    """Flips one bit; offset: of its byte, from the end if it is negative."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    return damage


TABLES = "is damaged: its header, fields, rows or allocation table have changed.*copy it again together with a.beton.j"
ROWS = 24 + 2 * 1041


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
    "cut in its header": (lambda p: p.write_bytes(p.read_bytes()[:30]), "is cut short: it has 30 bytes"),
    "grown": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "is not the file that was converted.*convert it again"),
    "version": (header(version=3), "FFCV version 3, this reads version 2.*kilobatch convert"),
    "fields": (header(num_fields=3), TABLES),
    "type of a field": (flip(24), TABLES),
    "name of a field": (flip(24 + 1), TABLES),
    "label": (flip(ROWS + 16), TABLES),
    "place of an image": (flip(ROWS + 24 + 5), TABLES),
    "sample of an allocation": (flip(-24), TABLES),
    "samples": (header(num_samples=29), r"counts 29 samples, a\.beton\.json says 30.*convert it again"),
    "no table": (header(alloc_table_ptr=0), "does not point to its allocation table.*convert it again"),
    "no note": (lambda p: note_path(p).unlink(), r"has no a\.beton\.json beside it.*copied alone.*kilobatch convert"),
    "note is text": (lambda p: note_path(p).write_text("{"), r"a\.beton\.json is damaged: .*checksum.*convert again"),
    "note is a list": (lambda p: note_path(p).write_text("[]"), "json is damaged: it is not as it was written"),
    "note is empty": (lambda p: note_path(p).write_text(""), "json is damaged: it is not as it was written"),
    "note is a folder": (lambda p: (note_path(p).unlink(), note_path(p).mkdir()), "cannot be read: Is a directory"),
    "note is old": (old_note, r"has format 1, this reads format 2.*kilobatch convert --adopt .*a\.beton"),
    "note's format": (note(format=3), r"a\.beton\.json has format 3, this reads format 2.*convert again"),
    "note's fields": (note(samples="many"), r"a\.beton\.json is damaged: samples: .*integer.*convert again"),
    "note's checksums": (note(samples_crc32c="AAAA"), "samples_crc32c has 4 letters, 160 are for its samp"),
    "letter of a class": (replace(b'"cat"', b'"bat"'), "json is damaged: it is not as it was written.*checksum"),
    "note's checksum": (replace(b'"note_crc32": "', b'"note_crc32": "0'), "json is damaged: it is not as"),
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
    for sample in (29, 7):
        flip(-(30 * 24 + (30 - sample) * 192 - 5))(whole)
    verify_beton(whole)
    with pytest.raises(
        UserError, match=r"SHA-256 is .*; 2 of its 30 samples have changed: sample 7, sample 29; convert it again"
    ):
        verify_beton(whole, full=True)


def test_full_check_finds_a_bit_between_the_samples(whole: Path):
    flip(100_000)(whole)
    with pytest.raises(UserError, match="is damaged: .*all samples are whole, bytes between them have changed"):
        verify_beton(whole, full=True)


def test_full_check_names_the_images(tmp_path: Path):
    for name in ("a/x.png", "a/y.png", "b/z.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "blue").save(tmp_path / "in" / name)
    path = tmp_path / "a.beton"
    convert(Folder(tmp_path / "in", "train"), path, progress=False)
    assert verify_beton(path, full=True).samples == 3
    flip(-(3 * 24 + 192 + 5))(path)
    with pytest.raises(UserError, match=r"1 of its 3 samples have changed: sample 1 \(a/y\.png\)"):
        verify_beton(path, full=True)
    names_path(path).write_text("of another file")
    with pytest.raises(UserError, match=r"1 of its 3 samples have changed: sample 1; convert"):
        verify_beton(path, full=True)
    flip(-(3 * 24 + 192 + 5))(path)
    with pytest.raises(UserError, match=r"a\.beton\.names is not the one that was written with a\.beton"):
        verify_beton(path, full=True)


def test_a_checked_file_is_read_again_only_when_it_has_changed(whole: Path, monkeypatch: pytest.MonkeyPatch):
    reads: list[Path] = []

    def read_tables(path: Path, *places: int) -> beton.Tables:
        reads.append(path)
        return original(path, *places)

    original = beton.read_tables
    monkeypatch.setattr(beton, "read_tables", read_tables)
    for _ in range(2):  # it was written a moment ago: a change might leave its time stamps as they are
        verify_beton(whole)
    assert len(reads) == 2
    monkeypatch.setattr(beton, "SETTLED", 0)
    for _ in range(3):
        assert verify_beton(whole).samples == 30
    assert len(reads) == 3
    os.utime(whole, ns=(1, 1))
    assert verify_beton(whole).samples == 30 and len(reads) == 4
    replace(b'"cat"', b'"bat"')(whole)
    with pytest.raises(UserError, match="its checksum differs"):
        verify_beton(whole)


def test_the_rows_are_ffcvs_own_for_any_fields():
    from ffcv.types import TYPE_ID_HANDLER, get_metadata_type

    handlers = {number: kind.__new__(kind) for number, kind in TYPE_ID_HANDLER.items() if kind is not None}
    assert sorted(handlers) == sorted(FIELD_TYPES)
    for order in permutations(FIELD_TYPES, 4):
        if IMAGE in order and INT in order:
            layout = row_layout([(number, str(number)) for number in order], str(IMAGE), str(INT))
            theirs = get_metadata_type([handlers[number] for number in order])
            assert theirs.fields is not None and layout.bytes == theirs.itemsize
            places = {number: field[1] for number, field in zip(order, theirs.fields.values(), strict=True)}
            assert (layout.image_offset, layout.label_offset) == (places[IMAGE], places[INT])
