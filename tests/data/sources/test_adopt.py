"""Adoption of .beton files that FFCV's own writer or an older kilobatch wrote."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kilobatch.data.beton import read_labels, read_names, verify_beton
from kilobatch.data.beton_layout import ALLOCATION, FIELD, HEADER
from kilobatch.data.beton_note import BetonInfo, names_path, note_path
from kilobatch.data.errors import UserError
from kilobatch.data.sources.adopt import adopt
from kilobatch.data.sources.convert import convert, prepare
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.folder import Folder
from kilobatch.launch.cli.convert import adopt_file
from tests.helpers.ffcv_files import IMAGES, ffcv_file
from tests.helpers.loaders import loader, photo, plain, stacked


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return ffcv_file(tmp_path_factory.mktemp("theirs") / "a.beton", ["label", "image", "score"]).read_bytes()


@pytest.fixture
def beton(theirs: bytes, tmp_path: Path) -> Path:
    (tmp_path / "a.beton").write_bytes(theirs)
    return tmp_path / "a.beton"


def stored(beton: Path, info: BetonInfo) -> list[tuple[int, bytes]]:
    """Label and bytes of each image."""
    data = beton.read_bytes()
    rows = np.frombuffer(data, info.rows.dtype(), info.samples, info.rows.first_row)
    sizes = {int(row["ptr"]): int(row["size"]) for row in np.frombuffer(data, ALLOCATION, offset=info.alloc_table_ptr)}
    places = [(int(row["label"]), int(row["data_ptr"])) for row in rows]
    return [(label, data[start : start + sizes[start]]) for label, start in places]


def converted(beton: Path, info: BetonInfo, folder: Path, side: int) -> Path:
    """The same images, converted here from a folder: JPEG files that are kept as they are, or small PNG files."""
    for i, (label, data) in enumerate(stored(beton, info)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        if side > 64:
            (folder / str(label) / f"{i:02}.jpg").write_bytes(data)
        else:
            pixels = np.frombuffer(data, np.uint8).reshape(side, side + i, 3)
            Image.fromarray(pixels).save(folder / str(label) / f"{i:02}.png")
    out = folder.parent / "ours.beton"
    convert(Folder(folder, "train"), out, progress=False)
    return out


@pytest.mark.parametrize(
    ("names", "mode", "side", "page"),
    [
        (["image", "label"], "jpg", 70, 1 << 23),
        (["label", "image"], "jpg", 70, 1 << 21),
        (["image", "label"], "raw", 40, 1 << 21),
        (["bytes", "label", "score", "text", "image", "array", "other"], "jpg", 70, 1 << 22),
    ],
)
def test_an_adopted_file_gives_the_batches_of_a_converted_one(
    names: list[str], mode: str, side: int, page: int, tmp_path: Path
):
    theirs = ffcv_file(tmp_path / "theirs.beton", names, mode, side, page_size=page)
    before = theirs.read_bytes()
    info = adopt(theirs, progress=False)
    assert theirs.read_bytes() == before and verify_beton(theirs, full=True) == info
    assert info.rows.fields == names and info.classes == ["0", "1", "2"]
    assert read_labels(theirs).tolist() == [i // 4 for i in range(IMAGES)]
    ours = converted(theirs, info, tmp_path / "in", side)
    assert stored(ours, verify_beton(ours)) == stored(theirs, info)
    with loader(theirs, batch=4) as first, loader(ours, batch=4) as second:
        for one, other in zip(first.epoch(1), second.epoch(1), strict=True):
            pairs = (one.views[0], other.views[0]), (one.index, other.index), (one.label, other.label)
            assert all(torch.equal(*pair) for pair in pairs)
    assert torch.equal(stacked(list(plain(theirs)))[0], stacked(list(plain(ours)))[0])


def test_the_labels_field_and_the_names_of_classes_are_given(tmp_path: Path):
    theirs = ffcv_file(tmp_path / "theirs.beton", ["coarse", "image", "fine", "other"])
    with pytest.raises(
        UserError, match="3 fields of type IntField, coarse, fine, other: name the one to use with --la"
    ):
        adopt(theirs, progress=False)
    with pytest.raises(UserError, match=r"-field is score; .* its fields are coarse \(IntField\), image \(RGBImageF"):
        adopt(theirs, label="score", progress=False)
    with pytest.raises(
        UserError, match=r"4 of the 12 samples of .* are broken(.|\n)*sample 8: its label is -1; labels"
    ):
        adopt(theirs, label="other", progress=False)
    names = tmp_path / "names.txt"
    for text, says in (
        ("ant\nbee\n", "are broken(.|\n)*sample 8: its label is 2; labels are from 0 to 1"),
        ("ant\n\ncat\n", "line 2 is empty"),
        ("ant\nbee\nant", "names 'ant' twice"),
        ("\xff", "is not a text file"),
    ):
        names.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=says):
            adopt(theirs, label="fine", classes=names, progress=False)
    with pytest.raises(UserError, match="--class-names .*cannot be read: No such file"):
        adopt(theirs, label="fine", classes=tmp_path / "none.txt", progress=False)
    assert not note_path(theirs).exists()
    names.write_text("ant\nbee\ncat\ndog\n")
    assert adopt(theirs, label="fine", classes=names, progress=False).classes == ["ant", "bee", "cat", "dog"]
    with pytest.raises(UserError, match=r"has a note already, theirs.beton.json; .*--verify"):
        adopt(theirs, label="fine", progress=False)


def test_a_file_that_no_recipe_could_name_is_adopted_by_a_link(theirs: bytes, tmp_path: Path):
    """ffcv-imagenet's files end in .ffcv, which recipes know."""
    known, file = tmp_path / "train_500_0.50_90.ffcv", tmp_path / "train.bin"
    for path in (known, file):
        path.write_bytes(theirs)
    link = tmp_path / "train.bin.beton"
    with pytest.raises(UserError, match=f"does not end in .beton or .ffcv, .* by: ln -s {file.name} {link.name}$"):
        adopt(file, progress=False)
    link.symlink_to(file.name)
    for path in (link, known):
        adopt(path, progress=False)
        assert len(read_labels(prepare(str(path), "train"))) == IMAGES
    with pytest.raises(UserError, match="by FFCV's own writer"):
        read_names(link)


def test_the_command_says_what_it_found(beton: Path, capsys: pytest.CaptureFixture[str]):
    adopt_file(beton, None, None, None, None)
    size = f"{beton.stat().st_size:,} bytes"
    assert f"adopted {beton}, wrote a.beton.json: 12 images in 3 classes, {size}" in capsys.readouterr().out


def row(sample: int, **values: int) -> Callable[[bytearray], None]:
    """Changes a row of a file with the fields label, image, score."""

    def damage(data: bytearray) -> None:
        places = {"label": (0, "<i8"), "mode": (8, "<u1"), "width": (9, "<u2"), "data_ptr": (13, "<u8")}
        for name, value in values.items():
            offset, kind = places[name]
            np.frombuffer(data, kind, 1, HEADER.itemsize + 3 * FIELD.itemsize + 32 * sample + offset)[0] = value

    return damage


def image(sample: int, skip: int, new: bytes) -> Callable[[bytearray], None]:
    def damage(data: bytearray) -> None:
        table = np.frombuffer(data, ALLOCATION, IMAGES, int(np.frombuffer(data, HEADER, 1)["alloc_table_ptr"][0]))
        start = int(table["ptr"][sample]) + skip
        data[start : start + len(new)] = new

    return damage


def descriptor(field: int, offset: int, new: int) -> Callable[[bytearray], None]:
    def damage(data: bytearray) -> None:
        data[HEADER.itemsize + field * FIELD.itemsize + offset] = new

    return damage


def cut(data: bytearray) -> None:
    del data[-30:]


DAMAGE = {
    "label": (row(3, label=-5), "1 of the 12 samples .* broken.*sample 3: its label is -5; labels are from 0 to 2"),
    "huge label": (row(3, label=10**12), "sample 3: its label is 1,000,000,000,000; labels are from 0 to 999,999"),
    "mode": (row(4, mode=2), "sample 4: its mode is 2; known: 0"),
    "mode of pixels": (row(4, mode=1), "sample 4: it has .* bytes for .* values"),
    "width": (row(5, width=80), "sample 5: its JPEG has 75 x 70 pixels, its row says 80 x 70"),
    "no width": (row(5, width=0), "sample 5: it has 0 x 70 pixels"),
    "place": (row(6, data_ptr=5_000), "sample 6: its place, byte 5,000, is not one of the file's allocations"),
    "place of another": (row(6, data_ptr=1 << 23), "sample 6: its place, .*, belongs to sample 0"),
    "no JPEG": (image(7, 0, b"abc"), "sample 7: Not a JPEG file"),
    "corrupt JPEG": (image(7, 700, bytes(60)), "sample 7: Corrupt JPEG data"),
    "cut": (cut, "was never finished, or is cut short"),
    "type": (descriptor(2, 0, 9), r"field 3, score, is of a type that FFCV does not have \(number 9\); known: Float"),
    "array": (descriptor(2, 0, 4), "field 3, score, does not say what arrays it holds"),
    "no image": (descriptor(1, 0, 1), r"has no RGBImageField to take the image from: .*FloatField\); .* with one$"),
    "no label": (
        descriptor(0, 0, 0),
        r"has no IntField to take the label from: its fields are label \(FloatField\), .*;"
        " write the file again with one, of zeros where",
    ),
    "name": (descriptor(2, 1, 200), "field 3 has no name that FFCV can read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_broken_file_is_refused(case: str, beton: Path):
    damage, message = DAMAGE[case]
    data = bytearray(beton.read_bytes())
    damage(data)
    beton.write_bytes(data)
    with pytest.raises(UserError, match=f"(?s){message}"):
        adopt(beton, progress=False)
    assert not note_path(beton).exists() and beton.read_bytes() == data


def test_all_broken_samples_are_counted_and_the_first_20_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beton):
    data = bytearray(beton.read_bytes())
    for sample in range(5):
        row(sample, label=-1)(data)
    beton.write_bytes(data)
    monkeypatch.setattr("kilobatch.data.sources.adopt.SHOWN", 3)
    with pytest.raises(UserError, match="(?s)5 of the 12 samples .*sample 0: .*sample 2: .*\n  and 2 more") as caught:
        adopt(beton, progress=False)
    assert "sample 3" not in str(caught.value)


def make_old(beton: Path) -> dict[str, Any]:
    """Writes the note as an older kilobatch did; returns it."""
    content = json.loads(note_path(beton).read_text())
    kept = "samples", "classes", "bytes", "sha256", "alloc_table_ptr", "max_side", "quality", "names_sha256"
    old = {"format": 1, "skipped": ["x.jpg: is broken"], **{name: content[name] for name in kept}}
    note_path(beton).write_text(json.dumps(old))
    return old


def test_a_file_of_an_older_kilobatch_keeps_its_classes_and_names(tmp_path: Path):
    for i in range(4):
        (tmp_path / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        photo(i, 80, 90).save(tmp_path / "in" / "ab"[i % 2] / f"{i}.jpg")
    beton = tmp_path / "a.beton"
    new = convert(Folder(tmp_path / "in", "train"), beton, encoding=Encoding(100), progress=False)
    names = read_names(beton)
    old = make_old(beton)
    with pytest.raises(UserError, match="format 1, .*kilobatch convert --adopt"):
        verify_beton(beton)
    with pytest.raises(UserError, match="names of the classes already; leave out --class-names and --label-field"):
        adopt(beton, label="label", progress=False)
    data, listed = beton.read_bytes(), names_path(beton).read_bytes()
    names_path(beton).write_bytes(b"x" + listed)
    with pytest.raises(UserError, match="a.beton.names is not the one that was written with a.beton"):
        adopt(beton, progress=False)
    names_path(beton).write_bytes(listed)
    beton.write_bytes(data[:-200] + b"x" + data[-199:])
    with pytest.raises(UserError, match="is damaged, or not the file of a.beton.json: its SHA-256 is"):
        adopt(beton, progress=False)
    beton.write_bytes(data)
    info = adopt(beton, progress=False)
    assert info == new.model_copy(update={"skipped": old["skipped"]})
    assert read_names(beton) == names and verify_beton(beton, full=True) == info


def test_damage_that_an_older_kilobatch_let_in_is_told(beton: Path):
    """It did not read libjpeg's warnings."""
    adopt(beton, progress=False)
    data = bytearray(beton.read_bytes())
    note_path(beton).unlink()
    image(7, 700, bytes(60))(data)
    beton.write_bytes(data)
    with pytest.raises(UserError, match="sample 7: Corrupt JPEG data"):
        adopt(beton, progress=False)
    note = {"format": 1, "samples": IMAGES, "classes": list("abc"), "bytes": len(data), "max_side": None, "quality": 90}
    note |= {"sha256": hashlib.sha256(data).hexdigest(), "alloc_table_ptr": 1, "skipped": []}
    note_path(beton).write_text(json.dumps(note))
    assert [text.split(":")[0] for text in adopt(beton, progress=False).warned] == ["sample 7"]
