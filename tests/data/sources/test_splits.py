"""Splits of a root: found or refused, never taken for classes."""

from pathlib import Path

import pytest
from PIL import Image

from kilobatch.data.errors import UserError
from kilobatch.data.sources.specs import Split, count_classes, count_images, open_source
from kilobatch.data.sources.splits import Shape, choose_split, split_folders

NESTED = Shape(("cat", "dog"), False, True)
FLAT = Shape((), True, False)
OTHER = Shape((), False, False)  # annotations, for one
ROOT = Path("photos")


def tree(root: Path, *files: str) -> None:
    """Images, each of another colour; a name without a suffix is that of an empty folder."""
    for i, name in enumerate(files):
        path = root / name
        if not path.suffix:
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
        else:
            path.write_text("no image")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(
            (name, "train")
            for name in ("train", "Train", "TRAINING", "trainval", "train2017", "training_set", "train-1", " train ")
        ),
        *((name, "test") for name in ("test", "Val", "validation", "valid", "dev", "EVAL", "val2017", "test_images")),
        *(
            (name, None)
            for name in ("trains", "train (class)", "trained", "contest", "value", "invalid", "device", "tests")
        ),
    ],
)
def test_names_of_splits(name: str, split: Split | None):
    assert split_folders([name]) == ({} if split is None else {name: split})


@pytest.mark.parametrize(
    ("folders", "train", "test"),
    [
        ({"train": NESTED, "val": NESTED}, "train", "val"),
        ({"Train": NESTED, "Val": NESTED}, "Train", "Val"),
        ({"TRAINING": NESTED, "validation": NESTED, "annotations": OTHER, "unlabeled": FLAT}, "TRAINING", "validation"),
        ({"train": NESTED, "valid": NESTED, "masks": NESTED}, "train", "valid"),
        ({"train2017": NESTED, "val2017": NESTED}, "train2017", "val2017"),
        ({"seg_train": NESTED, "seg_test": NESTED, "seg_pred": FLAT}, "seg_train", "seg_test"),
        ({"steam train": FLAT, "bullet_train": FLAT, "crash test": FLAT}, None, None),
        ({"train": NESTED, "extra": FLAT}, "train", "no test images: beside train/ there is no folder named test"),
        ({"train": NESTED}, "train", "has no test images: beside train/.*give another.*data.test=null"),
        ({"train": NESTED, "val": NESTED, "test": NESTED}, "train",
         "has 2 folders of test images; name one of them: folder:photos/val or folder:photos/test"),
        ({"val": NESTED}, "no training images: there is val/, but no.*to train on it: folder:photos/val", "val"),
        ({"val": NESTED, "test": NESTED}, "no training images: there is val/ and test/, but", "2 folders of test"),
        ({"Train": NESTED, "train": NESTED}, "2 folders of training images.*folder:photos/Train or folder:photos/train",
         "no test images"),
        # One folder of such a name, among others like it: a class, as in VOC and CIFAR-100, or a split?
        ({"train": FLAT, "car": FLAT}, "a folder 'train' beside 1 others.*rename it, for example to 'train .class",
         "a folder 'train' beside"),
        ({"test": FLAT, "car": FLAT, "bus": FLAT}, "a folder 'test' beside 2", "a folder 'test' beside 2"),
        ({"train": NESTED, "car": NESTED}, "may be a split or a class; if it is a split, give folder:photos/train",
         "may be a split"),
        ({"valid": FLAT, "invalid": FLAT}, None, None),
        ({"Dev": FLAT, "ops": FLAT}, None, None),
        ({"test2": FLAT, "other": FLAT}, None, None),
        ({"valid": FLAT, "train": FLAT, "invalid": FLAT}, "train", "valid"),
        ({"valid": NESTED, "labels": OTHER}, "no training images: there is valid/", "valid"),
        ({"valid": NESTED, "invalid": NESTED}, "may be a split or a class", "may be a split or a class"),
        ({"train": FLAT, "val": FLAT}, "train", "val"),
        ({"train": FLAT}, "train", "no test images"),
        ({"cat": FLAT, "dog": NESTED}, None, None),
    ],
)  # fmt: skip
def test_choice(folders: dict[str, Shape], train: str | None, test: str | None):
    wanted: dict[Split, str | None] = {"train": train, "test": test}
    for split, want in wanted.items():
        if want is None or want in folders:
            assert choose_split(ROOT, split, folders) == want
        else:
            with pytest.raises(UserError, match=want):
                choose_split(ROOT, split, folders)


def test_a_split_is_read_with_its_own_files_alone(tmp_path: Path):
    tree(tmp_path, "Train/cat/0.png", "Train/dog/1.png", "Val/cat/2.png", "annotations/3.png", "a.txt", "Train/b.txt")
    train, test = (open_source(f"folder:{tmp_path}", split) for split in ("train", "test"))
    assert (train.classes, train.names, sum(train.passed_over.values())) == (
        ["cat", "dog"], ["cat/0.png", "dog/1.png"], 1,
    )  # fmt: skip
    assert (test.classes, test.names, test.passed_over) == (["cat"], ["cat/2.png"], {})
    assert train.fingerprint() != test.fingerprint()


def refused(root: Path, split: Split, says: str) -> None:
    for ask in (open_source, count_images, count_classes):
        with pytest.raises(UserError, match=says):
            ask(f"folder:{root}", split)


def test_splits_without_class_folders(tmp_path: Path):
    tree(tmp_path, "train/0.png", "train/1.png", "val/2.png")
    train, test = (open_source(f"folder:{tmp_path}", split) for split in ("train", "test"))
    assert (train.classes, train.names) == (["all"], ["0.png", "1.png"])
    assert (test.classes, test.names) == (["all"], ["2.png"])


def test_what_lies_beside_decides_by_its_content(tmp_path: Path):
    tree(tmp_path, "train/0.png", "annotations/a.xml", "annotations/b.json")
    assert open_source(f"folder:{tmp_path}", "train").names == ["0.png"]
    Image.new("RGB", (8, 8)).save(tmp_path / "annotations" / "no_suffix", "PNG")
    refused(tmp_path, "train", r"a folder 'train' beside 1 others with images")
    tree(tmp_path / "words", "valid/0.png", "invalid/1.png")
    assert open_source(f"folder:{tmp_path}/words", "train").classes == ["invalid", "valid"]


def test_a_class_named_after_a_split_within_a_split(tmp_path: Path):
    tree(tmp_path, "train/car/0.png", "train/train/1.png", "test/car/2.png", "test/train/3.png")
    refused(
        tmp_path, "train", r"train is a split, and its folder 'train' is named after one again; if that is a class, "
    )
    refused(tmp_path / "train", "train", r"a folder 'train' beside 1 others with images.*rename it")
    for split in ("train", "test"):
        (tmp_path / split / "train").rename(tmp_path / split / "train (class)")
    assert open_source(f"folder:{tmp_path}", "test").classes == ["car", "train (class)"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (("bottle/train/good/0.png", "bottle/test/broken/1.png", "cable/train/good/2.png"),
         r"class folder 'bottle' holds splits \(bottle/t.*, bottle/t.*\), so that .* mixed; give .*/bottle, or"),
        (("images/Train/0.png", "images/Val/1.png"), r"'images' holds splits \(images/Train, images/Val\)"),
        (("a/b/c/training/0.png", "a/b/c/valid/1.png", "d/2.png"), r"class folder 'a' holds .*folder:.*/a/b/c, or"),
        (("archive/train/cat/0.png", "archive/train/dog/1.png"), r"'archive' holds splits \(archive/train\)"),
        (("seg_train/seg_train/a/0.png", "seg_test/seg_test/a/1.png"),
         r"seg_t\w+ is a split, and its folder 'seg_t\w+' is named after one again"),
        (("train.X1/a/0.png", "train.X2/b/1.png", "val.X/a/2.png", "labels/a.json"),
         r"images in 3 folders alone, which are named as splits are \(train.X1, .*give one of them, such as folder:"),
        (("train_32x32/a/0.png", "valid_32x32/a/1.png"), r"named as splits are \(train_32x32, valid_32x32\)"),
        (("in_train_set_1/0.png", "in_test_set_1/1.png"), r"named as splits are \(in_test_set_1, in_train_set_1\)"),
    ],
)  # fmt: skip
def test_splits_within_classes_or_themselves_and_parts_of_splits(files: tuple[str, ...], says: str, tmp_path: Path):
    tree(tmp_path, *files)
    refused(tmp_path, "train", says)
    refused(tmp_path, "test", says)


@pytest.mark.parametrize(
    "folders",
    [("train (class)", "test (class)"), ("train_station", "test_tube", "car"), ("bullet_train_1", "crash_test_1"),
     ("train_a", "train_b"), ("trains", "tests")],
)  # fmt: skip
def test_classes_that_begin_with_the_name_of_a_split(folders: tuple[str, ...], tmp_path: Path):
    tree(tmp_path, *(f"{name}/0.png" for name in folders))
    assert open_source(f"folder:{tmp_path}", "train").classes == sorted(folders)


def test_a_folder_of_a_class_may_bear_the_name_of_one_split(tmp_path: Path):
    tree(tmp_path, "vehicles/train/0.png", "vehicles/car/1.png", "animals/cat/2.png")
    assert count_images(f"folder:{tmp_path}", "train") == 3


def test_a_split_that_is_a_link_to_nowhere(tmp_path: Path):
    tree(tmp_path, "val/cat/0.png")
    (tmp_path / "train").symlink_to("/nowhere/train")
    refused(tmp_path, "train", r"no train images: train is a link to /nowhere/train, which does not exist; mount")
    assert count_images(f"folder:{tmp_path}", "test") == 1
    tree(tmp_path / "elsewhere", "dog/1.png")
    (tmp_path / "train").unlink()
    (tmp_path / "train").symlink_to(tmp_path / "elsewhere")
    assert open_source(f"folder:{tmp_path}", "train").classes == ["dog"]
