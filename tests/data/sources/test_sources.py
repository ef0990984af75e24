"""Data sources: those that can be opened, and those that are refused, with the file and the way out in the message."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import ArrayLike
from PIL import Image

from kilobatch.data.errors import UserError
from kilobatch.data.sources.image_files import BrokenImage
from kilobatch.data.sources.specs import absolute_spec, count_classes, count_images, open_source, path_of


def image(path: Path, value: int = 0, side: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (value, value, value)).save(path)


def test_folder_sorts_classes_and_looks_below(tmp_path: Path):
    image(tmp_path / "zebra" / "b.png", 4)
    image(tmp_path / "ant" / "deep" / "er" / "x.JPG", 2)
    image(tmp_path / "ant" / "a.gif", 1)
    image(tmp_path / "zebra" / "a.bmp", 3)
    image(tmp_path / ".hidden" / "a.png")
    image(tmp_path / "ant" / "._a.png")
    (tmp_path / "ant" / "readme.txt").write_text("no image")
    (tmp_path / "ant" / "deep" / "loop").symlink_to(tmp_path / "ant")
    source = open_source(f"folder:{tmp_path}", "train")
    assert source.classes == ["ant", "zebra"]
    assert count_images(f"folder:{tmp_path}", "train") == len(source) == 4
    assert [(int(pixels[0, 0, 0]), label) for pixels, label in map(source.__getitem__, range(4))] == [
        (1, 0), (2, 0), (3, 1), (4, 1),
    ]  # fmt: skip


def test_folder_takes_the_split_where_there_is_one(tmp_path: Path):
    for split, images in (("train", 3), ("val", 2)):
        for i in range(images):
            image(tmp_path / split / "cat" / f"{i}.png")
    assert (count_images(f"folder:{tmp_path}", "train"), count_images(f"folder:{tmp_path}", "test")) == (3, 2)
    assert open_source(f"folder:{tmp_path}", "test").classes == ["cat"]


def test_a_folder_may_end_in_beton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "a: b.beton" / "cat" / "a.png")
    for spec in ("folder:a: b.beton", "folder:a: b.beton/", f"folder:{tmp_path}/a: b.beton"):
        assert count_images(spec, "train") == count_classes(spec, "train") == len(open_source(spec, "train")) == 1
        assert absolute_spec(spec) == f"folder:{tmp_path}/a: b.beton"


def test_a_path_alone_is_a_folder_or_an_npz_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "my: photos" / "cat" / "a.png")
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=[0, 1])
    for spec, images, scheme in (("my: photos", 1, "folder"), ("./my: photos/", 1, "folder"), ("a.npz", 2, "npz")):
        assert count_images(spec, "train") == len(open_source(spec, "train")) == images
        assert (
            absolute_spec(spec) == f"{scheme}:{path_of(spec)}" and count_images(absolute_spec(spec), "train") == images
        )


def test_images_without_class_folders_are_one_class(tmp_path: Path):
    for name in ("b.png", "a.png"):
        image(tmp_path / name)
    (tmp_path / "c.png").symlink_to("none")
    (tmp_path / "words.txt").write_text("text")
    source = open_source(f"folder:{tmp_path}", "train")
    assert (source.classes, source.names) == (["all"], ["a.png", "b.png", "c.png"])
    assert source.passed_over == {"not images (.txt)": 1} and source[0][1] == 0
    with pytest.raises(BrokenImage, match="c.png is a link to .*none, which does not exist"):
        source[2]


def test_folder_fingerprint_follows_names_and_contents(tmp_path: Path):
    image(tmp_path / "cat" / "a.png", 1)
    seen = {open_source(f"folder:{tmp_path}", "train").fingerprint() for _ in range(2)}
    image(tmp_path / "cat" / "a.png", 2, side=9)
    seen.add(open_source(f"folder:{tmp_path}", "train").fingerprint())
    image(tmp_path / "cat" / "b.png", 1)
    seen.add(open_source(f"folder:{tmp_path}", "train").fingerprint())
    assert len(seen) == 3


def test_folder_with_names_that_are_not_utf8(tmp_path: Path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.png")).write_bytes(b"nothing")
    source = open_source(f"folder:{tmp_path}", "train")
    assert source.classes == ["caf\\udce9"]
    with pytest.raises(BrokenImage) as caught:
        source[0]
    assert str(caught.value).encode()


def test_digits_are_split_once_and_for_all():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360) == (count_images("digits", "train"), count_images("digits", "test"))
    labels = np.array([test[i][1] for i in range(360)])
    assert (np.abs(np.bincount(labels) - 36) <= 1).all()
    pixels = [{source[i][0].tobytes() for i in range(len(source))} for source in (train, test)]
    assert not pixels[0] & pixels[1]
    picture, label = train[0]
    assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8 and picture.max() > 200 and label < 10
    assert train.fingerprint() == open_source("digits", "train").fingerprint() != test.fingerprint()


def test_npz_in_both_forms(tmp_path: Path):
    grey = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    np.savez(tmp_path / "one.npz", images=grey, labels=np.array([[0], [2], [1]]))
    source = open_source(f"npz:{tmp_path / 'one.npz'}", "test")
    assert (source[1][0] == grey[1][..., None]).all() and [source[i][1] for i in range(3)] == [0, 2, 1]
    assert source.classes == ["0", "1", "2"]
    rgb = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(
        tmp_path / "two.npz", x_train=rgb, y_train=[0, 0], x_test=rgb[:1] + 1, y_test=[1], class_names=["cat", "dog"]
    )
    spec = f"npz:{tmp_path / 'two.npz'}"
    assert (count_images(spec, "train"), count_images(spec, "test")) == (2, 1)
    assert open_source(spec, "train").classes == open_source(spec, "test").classes == ["cat", "dog"]
    assert open_source(spec, "test")[0][0].max() == 1


def cifar(root: Path) -> None:
    """Writes CIFAR-10's files as torchvision stores them, but with other checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}))


def npz(**arrays: ArrayLike) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        np.savez(path / "a.npz", allow_pickle=True, **arrays)

    return make


def text(path: Path) -> None:
    (path / "a.npz").write_text("text")


def cut(path: Path) -> None:
    npz(images=np.zeros((9, 8, 8), np.uint8), labels=np.zeros(9, int))(path)
    whole = (path / "a.npz").read_bytes()
    (path / "a.npz").write_bytes(whole[:-60])


PIXELS = np.zeros((2, 4, 4, 3), np.uint8)
# A function that fills a folder, the spec ('@' is the folder), parts of the message: the place and the way out.
REFUSED: dict[str, tuple[Callable[[Path], object] | None, str, tuple[str, ...]]] = {
    "unknown scheme": (None, "foldr:@", ("'foldr:", "did you mean 'folder'?", "npz:FILE")),
    "bare npz is text": (text, "@/a.npz", ("a.npz is not an .npz file", "numpy.savez")),
    "a single image": (lambda p: image(p / "a.jpg"), "@/a.jpg", ("/a.jpg' is unknown, and it is a single file",)),
    "no folder by its path": (None, "@/none", ("/none' is unknown, and there is no folder", "folder:PATH")),
    "no path": (None, "folder:", ("names no path", "folder:PATH")),
    "digits with a path": (None, "digits:@", ("takes no path", "write digits")),
    "missing folder": (None, "folder:@/none", ("/none", "no such folder", "holds images, or a folder")),
    "file as folder": (text, "folder:@/a.npz", ("a.npz", "is a file", "give the folder")),
    "empty folder": (None, "folder:@", ("no images", "give a folder")),
    "only a link that leads nowhere": (
        lambda p: (p / "a.png").symlink_to("none"), "folder:@", ("no images (1 links in it lead nowhere", "a.png"),
    ),
    "empty class": (
        lambda p: (image(p / "cat" / "a.png"), (p / "dog").mkdir()),
        "folder:@",
        ("class folder 'dog' has no images", "fill or remove"),
    ),
    "cifar missing": (None, "cifar10:@", ("cifar-10-batches-py", "download=True")),
    "cifar100 missing": (None, "cifar100:@/none", ("cifar-100-python", "CIFAR100", "download=True")),
    "cifar's own folder": (cifar, "cifar10:@/cifar-10-batches-py", ("give the one above",)),
    "cifar damaged": (cifar, "cifar10:@", ("incomplete or damaged", "download=True")),
    "npz missing": (None, "npz:@/a.npz", ("a.npz", "no such file", "numpy.savez")),
    "npz folder": (None, "npz:@", ("cannot be read", "check the file")),
    "npz is text": (text, "npz:@/a.npz", ("a.npz is not an .npz file", "numpy.savez")),
    "npz cut short": (cut, "npz:@/a.npz", ("a.npz", "cut short", "numpy.savez")),
    "npz single array": (
        lambda p: np.save((p / "a.npz").open("wb"), PIXELS), "npz:@/a.npz", ("single array", "numpy.savez"),
    ),
    "npz other keys": (npz(data=PIXELS, labels=[0, 0]), "npz:@/a.npz", ("data, labels", "x_train, y_train")),
    "npz no test": (npz(x_train=PIXELS, y_train=[0, 0]), "npz:@/a.npz", ("no images for test", "x_test")),
    "npz floats": (npz(images=PIXELS / 255, labels=[0, 0]), "npz:@/a.npz", ("float64", "must be uint8")),
    "npz channels first": (
        npz(images=PIXELS.transpose(0, 3, 1, 2), labels=[0, 0]), "npz:@/a.npz", ("(2, 3, 4, 4)", "channels last"),
    ),
    "npz too few labels": (npz(images=PIXELS, labels=[0]), "npz:@/a.npz", ("2 images", "1 labels", "one each")),
    "npz text labels": (npz(images=PIXELS, labels=["a", "b"]), "npz:@/a.npz", ("<U1", "integers from 0")),
    "npz negative labels": (npz(images=PIXELS, labels=[0, -1]), "npz:@/a.npz", ("from -1", "integers from 0")),
    "npz objects": (npz(images=PIXELS, labels=np.array([0, None])), "npz:@/a.npz", ("Python objects", "plain array")),
    "npz few names": (
        npz(images=PIXELS, labels=[0, 2], class_names=["a"]), "npz:@/a.npz", ("up to 2", "leave class_names out"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path):
    make, spec, parts = REFUSED[case]
    if make:
        make(tmp_path)
    with pytest.raises(UserError) as caught:
        open_source(spec.replace("@", str(tmp_path)), "test")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("case", [case for case in REFUSED if not case.startswith("npz") and case != "cifar damaged"])
def test_counting_refuses_what_opening_refuses(case: str, tmp_path: Path):
    make, spec, parts = REFUSED[case]
    if make:
        make(tmp_path)
    with pytest.raises(UserError) as caught:
        count_images(spec.replace("@", str(tmp_path)), "test")
    assert parts[0] in str(caught.value)
