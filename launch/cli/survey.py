"""Looks at a data set for `kilobatch init`: how many images, how large, its classes, and where test images are."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kilobatch.data.beton import read_short_sides, verify_beton
from kilobatch.data.sources.folder import Folder, folder_of_split
from kilobatch.data.sources.hold_out import held_out_path
from kilobatch.data.sources.listing import list_folder
from kilobatch.data.sources.specs import (
    absolute_spec,
    count_images,
    has_test_split,
    is_beton,
    open_source,
    path_of,
    scheme_of,
    spec_at,
)
from kilobatch.data.sources.splits import split_folders
from kilobatch.data.sources.walk import describe_passed_over
from kilobatch.launch.recipes.data import class_numbers

NO_TEST = (
    "no folder or file of test images lies beside them, so nothing is scored: for PATH/train/CLASS and PATH/val/CLASS "
    "it would be; kilobatch eval RUN --test SPEC takes some later"
)
SAMPLE = 16  # images that are decoded to learn their sizes, spread over all


@dataclass(frozen=True)
class Survey:
    """What a data set holds.

    train, test: specs for a recipe; test None: none are known, or they have other classes, as no_test says; side: of an
    image, pixels of its shorter side, the median; classes: their number, 1 where there are no labels; passed_over: what
    else lies beside the training images, and why it is not taken.
    """

    train: str
    test: str | None
    images: int
    test_images: int
    side: int
    classes: int
    no_test: str = ""
    passed_over: str = ""


def survey(spec: str) -> Survey:
    """Looks at the images of a .beton or a source. Raises UserError where it cannot be opened, and for an image that is
    broken."""
    train = _training_spec(absolute_spec(spec))
    if is_beton(train):
        info, beton = verify_beton(Path(train)), Path(train)
        images, classes, sides, others = info.samples, info.classes, read_short_sides(beton), ""
    else:
        source = open_source(train, "train")
        images, classes = len(source), source.classes
        rows = np.linspace(0, images - 1, min(SAMPLE, images)).round().astype(int)
        sides = np.array([min(source[int(row)][0].shape[:2]) for row in rows])
        others = describe_passed_over(source.passed_over)
    found = Survey(train, None, images, 0, int(np.median(sides)), len(classes), passed_over=others)
    test = _test_spec(train)
    if not classes:
        return _without_test(found, "images without labels have nothing to evaluate by")
    if len(classes) < 2:
        return _without_test(found, "images of a single class have no labels to evaluate by")
    if test is None:
        return _without_test(found, NO_TEST)
    test_classes = verify_beton(Path(test)).classes if is_beton(test) else open_source(test, "test").classes
    if class_numbers(classes, test_classes) is None:
        return _without_test(found, f"{test} has other classes")
    return replace(found, test=test, test_images=count_images(test, "test"))


def _without_test(found: Survey, why: str) -> Survey:
    return replace(found, no_test=why)


def _training_spec(spec: str) -> str:
    """The spec itself; for a folder that holds splits, that of its training images."""
    path = path_of(spec)
    if is_beton(spec) or path is None or scheme_of(spec) not in ("folder", "tree"):
        return spec
    if scheme_of(spec) == "tree":
        return spec_at(spec, folder_of_split(path, "train", "tree"))
    return spec_at(spec, Folder(path, "train").path)


def _test_spec(train: str) -> str | None:
    """The spec of the test images that belong to a data set: its own other split, or the file or folder next to it that
    is named after the test split, as train.beton has test.beton. Of several, the one for validation."""
    path = path_of(train)
    if path is None or train.startswith("cifar"):
        return train
    if train.startswith("npz:"):
        with np.load(path, allow_pickle=False) as file:
            if "x_test" in file.files:
                return train
    if is_beton(train) and held_out_path(path).exists():
        return str(held_out_path(path))
    if scheme_of(train) in ("hf", "torchvision", "python"):
        return train if has_test_split(train) else None
    if path.is_dir():
        names = {name: path.with_name(name) for name in list_folder(str(path.parent)).folders}
    else:
        names = {file.stem: file for file in path.parent.glob(f"*{path.suffix}")}
    splits = split_folders(names)
    if splits.get(path.name if path.is_dir() else path.stem) != "train":
        return None
    tests = sorted(name for name, split in splits.items() if split == "test")
    chosen = next((name for name in tests if "val" in name.casefold()), tests[0] if tests else None)
    return None if chosen is None else spec_at(train, names[chosen])
