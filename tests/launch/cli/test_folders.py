"""Folders that are refused: `train` and `convert` say the same, name the file or folder, and leave nothing behind."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

# by what is wrong: the files ("->": a link), and a part of the message
TRAIN: dict[str, tuple[list[str], str]] = {
    "a link that leads nowhere": (["cat/a.png", "dog/x.png -> /nowhere/x.png"], "link to /nowhere/x.png, which does"),
    "a class that leads nowhere": (
        ["cat/a.png", "dog -> /nowhere/dog"],
        "in/dog is a link to /nowhere/dog, which does",
    ),
    "a circle of links": (["cat/a.png", "cat/b.png -> b.png"], "cat/b.png is a link to b.png, and by that to itself"),
    "a split among classes": (["train/a.png", "car/b.png"], "has a folder 'train' beside 1 others"),
    "test images alone": (["Val/cat/a.png"], "has no training images: there is Val/"),
    "splits within classes": (["a/train/x/1.png", "a/test/x/2.png"], "class folder 'a' holds splits"),
    "two spellings of a class": (["caf\u00e9/a.png", "cafe\u0301/a.png"], "have the same name, 'caf\u00e9'"),
}


def make(root: Path, files: list[str]) -> None:
    for i, line in enumerate(files):
        name, _, target = line.partition(" -> ")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if target:
            (root / name).symlink_to(target)
        else:
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name)


def refusals(kilobatch: Callable, tmp_path: Path, split: str) -> tuple[str, str]:
    """What train and convert say. Both must end with 2 and write nothing but train's log of the conversion."""
    data = ["data.train=folder:in", "data.test=null"] if split == "train" else ["data.test=folder:in"]
    train = kilobatch("train", "demo", "--workers", "1", "data.batch=2", *data)
    convert = kilobatch("convert", "folder:in", "out.beton", "--split", split)
    assert (train.code, convert.code) == (2, 2), train.err + convert.err
    assert "Traceback" not in train.err + convert.err
    assert not list(tmp_path.rglob("*.beton*"))
    return train.err, convert.err


@pytest.mark.parametrize("case", TRAIN)
def test_refused_alike(case: str, kilobatch: Callable, tmp_path: Path):
    files, says = TRAIN[case]
    make(tmp_path / "in", files)
    for text in refusals(kilobatch, tmp_path, "train"):
        assert says in " ".join(text.split())


def test_test_images_that_are_not_there_or_twice(kilobatch: Callable, tmp_path: Path):
    make(tmp_path / "in", ["train/cat/a.png"])
    for text in refusals(kilobatch, tmp_path, "test"):
        assert "has no test images: beside train/" in text and "data.test=null" in text
    make(tmp_path / "in", ["val/cat/a.png", "Test/cat/a.png"])
    for text in refusals(kilobatch, tmp_path, "test"):
        assert "name one of them: folder:" in text and "in/Test or folder:" in text


def test_a_broken_link_is_left_out_and_named(kilobatch: Callable, tmp_path: Path):
    make(tmp_path / "in", ["cat/a.png", "dog/b.png", "dog/x.png -> /nowhere/x.png"])
    done = kilobatch("convert", "--skip-broken", "folder:in", "out.beton")
    assert done.code == 0, done.err
    assert "x.png is a link to /nowhere/x.png" in (tmp_path / "out.beton.json").read_text()
    assert (tmp_path / "out.beton.names").read_text() == "cat/a.png\ndog/b.png\n"


def test_any_name_is_printed(kilobatch: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Most systems' stdout refuses what stands for bytes that are not UTF-8."""
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    make(tmp_path / "in", ["cat/a.png"])
    (tmp_path / "in" / "cat" / "b.\udcff\n").write_text("no image")
    done = kilobatch("convert", "folder:in", "out\n\udcff.beton")
    assert done.code == 0, done.err
    assert done.out.startswith(r"wrote out\n\udcff.beton: 1 images") and r"1 not images (.\udcff\n)" in done.out


def test_a_range_that_changes_nothing_is_said(kilobatch: Callable, tmp_path: Path):
    make(tmp_path / "in", ["cat/a.png"])
    converted = kilobatch("convert", "folder:in", "out.beton", "--range", "0,4095")
    assert converted.code == 0 and "--range 0,4095 changed nothing: no image has more than 8 bits" in converted.err
