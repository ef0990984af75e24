"""Names of files and folders of all kinds: right in classes, lists and paths, or refused."""

import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from kilobatch.data.errors import UserError
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.specs import count_images, open_source


def image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def test_names_of_all_kinds_are_classes_and_images(tmp_path: Path):
    odd = [
        "#1",
        "$HOME",
        "_x",
        "a: b",
        " space ",
        "日本",
        "Ünïcode",
        "a\nb",
        "a\tb",
        "back\\slash",
        os.fsdecode(b"\xff"),
    ]
    for i, name in enumerate(odd):
        image(tmp_path / "in" / name / f"{name}.png", i)
    source = open_source(f"folder:{tmp_path / 'in'}", "train")
    assert set(source.classes) == {
        "#1", "$HOME", "_x", "a: b", " space ", "日本", "Ünïcode", "a\\nb", "a\\tb", "back\\slash", "\\udcff",
    }  # fmt: skip
    for i in range(len(source)):
        pixels, label = source[i]
        assert source.classes[label] == Folder(tmp_path / "in", "train").classes[label]
        assert odd[int(pixels[0, 0, 0])] in (source.classes[label], "a\nb", "a\tb", os.fsdecode(b"\xff"))
    info = convert(source, tmp_path / "a.beton", progress=False)
    names = (tmp_path / "a.beton.names").read_text().split("\n")[:-1]
    assert info.samples == len(names) == len(odd) and names == source.names


def test_two_names_are_never_one_line(tmp_path: Path):
    for name in ("a\nb.png", "a\\nb.png", "a\\\\nb.png", os.fsdecode(b"\xff.png"), "\\udcff.png", "a\u2028b.png"):
        image(tmp_path / "cat" / name)
    names = open_source(f"folder:{tmp_path}", "train").names
    assert names is not None and len(set(names)) == 6 and all(len(name.splitlines()) == 1 for name in names)


def test_classes_are_the_same_whichever_way_a_disk_writes_accents(tmp_path: Path):
    for form in ("NFC", "NFD"):
        for name in ("café", "cafz", "zoë"):
            image(tmp_path / form / unicodedata.normalize(form, name) / "a.png")
    classes = [Folder(tmp_path / form, "train").classes for form in ("NFC", "NFD")]
    assert classes[0] == classes[1] and unicodedata.is_normalized("NFC", "".join(classes[1]))
    both = tmp_path / "NFD" / "café"
    image(both / "b.png")
    with pytest.raises(UserError, match=r"the class folders 'cafe\\u0301' and 'caf\\xe9' have the same name, 'café'"):
        Folder(tmp_path / "NFD", "train")


def test_a_folder_is_found_in_the_other_unicode_form(tmp_path: Path):
    typed, stored = (unicodedata.normalize(form, "Zoë/Fotos é") for form in ("NFC", "NFD"))
    image(tmp_path / stored / "cat" / "a.png")
    assert count_images(f"folder:{tmp_path / typed}", "train") == 1
    image(tmp_path / "back" / unicodedata.normalize("NFC", "é") / "cat" / "a.png")
    assert count_images(f"folder:{tmp_path}/back/e\u0301", "train") == 1
    with pytest.raises(UserError, match="no such folder"):
        open_source(f"folder:{tmp_path}/back/ö", "train")
