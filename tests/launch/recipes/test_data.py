"""Data as a launcher prepares them: what train's and test's classes and pixels have to share, and what is said."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kilobatch.data.beton import read_short_sides, verify_beton
from kilobatch.data.beton_note import BetonInfo, note_path, note_text
from kilobatch.data.errors import UserError
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.specs import open_source
from kilobatch.launch.recipes.data import PreparedData, class_numbers, prepare_data, with_absolute_paths
from kilobatch.launch.recipes.recipe import Recipe, resolve_recipe


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KILOBATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path


def images(path: str, side: int = 40, count: int = 2) -> None:
    for i in range(count):
        Path(path).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((side, side + 8, 3), 20 * i, np.uint8)).save(f"{path}/{i}.png")


def recipe(*changes: str) -> Recipe:
    return resolve_recipe("demo", ["data.train=folder:train", "data.test=folder:test", *changes])


@pytest.mark.parametrize(
    ("train", "test", "numbers"),
    [
        (["a", "b", "c"], ["a", "b", "c"], [0, 1, 2]),
        (["a", "b", "c"], ["c", "a"], [2, 0]),
        (["a", "b", "c"], ["b", "c", "a"], [1, 2, 0]),
        (["a", "caf\u00e9"], ["cafe\u0301"], [1]),
        (["cafe\u0301", "a"], ["caf\u00e9", "a"], [0, 1]),
        (["a", "b"], ["a", "d"], None),
        (["a", "b"], ["a", "A"], None),
        (["a", "a"], ["a", "a"], [0, 1]),  # the labels of one numbering
        (["a", "a"], ["a"], None),
        (["a", "b"], ["b", "b"], None),
    ],
)
def test_classes_are_found_by_name(train: list[str], test: list[str], numbers: list[int] | None):
    assert class_numbers(train, test) == numbers


def test_test_classes_that_training_lacks_are_refused_by_name():
    for name in ("train/a", "train/b", "test/b", "test/x", "test/y"):
        images(name)
    says = r"\(3 classes\) has other classes than data.train 'folder:train' \(2\).*only in data.test: x, y; use test"
    with pytest.raises(UserError, match=says):
        prepare_data(recipe())


def test_some_of_the_classes_are_enough():
    for name in ("train/a", "train/b", "train/c", "test/b"):
        images(name)
    data = prepare_data(recipe())
    assert data.test is not None
    assert [verify_beton(file.beton).classes for file in (data.train, data.test)] == [["a", "b", "c"], ["b"]]
    assert [verify_beton(file.beton).sha256 for file in (data.train, data.test)] == [
        data.train.sha256,
        data.test.sha256,
    ]
    assert PreparedData.model_validate_json(data.arguments()[1]) == data


def with_range(beton: str, low_high: tuple[float, float]) -> None:
    path = Path(beton)
    info: BetonInfo = verify_beton(path).model_copy(update={"value_range": low_high})
    note_path(path).write_bytes(note_text(info))


def test_pixels_of_two_ranges_are_refused():
    for split in ("train", "test"):
        images(f"{split}/a")
        convert(open_source(f"folder:{split}", "train"), Path(f"{split}.beton"), progress=False)
    betons = recipe("data.train=train.beton", "data.test=test.beton")
    with_range("train.beton", (0, 4095))
    prepare_data(betons)  # there is nothing to compare with
    with_range("test.beton", (0, 4095))
    prepare_data(betons)
    with_range("test.beton", (0, 65535))
    with pytest.raises(UserError, match=r"--range 0,4095\) .*--range 0,65535\); convert both with .*--range LOW,HIGH"):
        prepare_data(betons)


def test_enlarged_views_are_said_once(capsys: pytest.CaptureFixture[str]):
    images("train/a", side=41)
    images("test/a", side=63, count=3)
    images("test/a", side=64, count=1)
    for _ in range(2):
        prepare_data(recipe("data.views.size=64"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert [line.partition("64, but ")[2].partition(" have fewer")[0] for line in lines] == [
        "2 of the 3 images of data.test 'folder:test'",
        "2 of the 2 images of data.train 'folder:train'",
    ]
    shorter = "have fewer pixels on their shorter side (half of them at most 41), so that views are enlarged"
    assert "data.views.size is 64" in lines[0] and shorter in lines[1] and "at most 63" in lines[0]
    assert "--max-side 512 --min-side 256, else use a smaller size" in lines[0]
    images("test/a", side=64, count=2)
    prepare_data(recipe("data.train=folder:test", "data.views.size=64"))
    assert "fewer pixels" not in capsys.readouterr().err  # one of three is smaller


def test_test_images_that_are_training_images_are_said(capsys: pytest.CaptureFixture[str]):
    images("train/a", count=5)
    images("test/a", count=2)
    images("test/a", side=41, count=1)
    prepare_data(recipe("data.views.size=32"))
    says = "1 of the 2 images of data.test 'folder:test' are training images as well (data.train 'folder:train')"
    assert says in capsys.readouterr().err
    images("test/a", side=42, count=2)
    prepare_data(recipe("data.views.size=32"))
    assert "warning" not in capsys.readouterr().err


def test_the_side_kept_follows_the_views():
    images("train/a", side=1300, count=1)
    for size, side in ((224, 512), (448, 1024), (576, 1308)):
        data = prepare_data(recipe("data.test=null", f"data.views.size={size}"))
        assert read_short_sides(data.train.beton).tolist() == [round(1300 * min(side, 1308) / 1308)]


def test_a_folder_that_no_recipe_can_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    odd = tmp_path / "caf\udce9"
    odd.mkdir()
    monkeypatch.chdir(odd)
    images("train/a")
    with pytest.raises(UserError, match=r"caf\\\\?udce9/train has bytes that are not UTF-8, which no recipe can hold"):
        with_absolute_paths(recipe("data.test=null"))
