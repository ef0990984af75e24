"""Prepares a recipe's data: makes paths absolute, converts sources to .beton, compares training with test images. Loads
no torch."""

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from kilobatch.data.beton import BetonInfo, read_fingerprints, read_labels, read_short_sides, verify_beton
from kilobatch.data.errors import UserError, warn
from kilobatch.data.loading.labels import count_known, known_samples, labelled_samples, used_samples
from kilobatch.data.sources.convert import prepare
from kilobatch.data.sources.encoding import encoding_for_views
from kilobatch.data.sources.path_names import composed, printable
from kilobatch.data.sources.specs import Split, absolute_spec
from kilobatch.data.views.groups import largest_side
from kilobatch.launch.recipes import references
from kilobatch.launch.recipes.recipe import Recipe


class PreparedFile(BaseModel):
    """A .beton with the images of data.train or data.test, by its absolute path, and the SHA-256 in its note."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    beton: Path
    sha256: str


class PreparedData(BaseModel):
    """The files that a launcher has found or converted for a recipe, and that it names to the workers: so no worker
    opens a source, which may be a large array or a folder of a million files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: PreparedFile
    test: PreparedFile | None = None

    def arguments(self) -> list[str]:
        """Those of a worker that is to use these files."""
        return ["--data", self.model_dump_json()]


def prepare_data(recipe: Recipe) -> PreparedData:
    """Converts sources that are no .beton yet: once, here, rather than in each worker.

    Warns of test images that are training images, and of images that are smaller than the views. Raises UserError, also
    where labels or pixels of training and test images do not mean the same.
    """
    size = largest_side(recipe.data.groups)
    train = _prepare(recipe.data.train, "train", size)
    test = None if recipe.data.test is None else _prepare(recipe.data.test, "test", size)
    if test is not None:
        infos = verify_beton(train.beton), verify_beton(test.beton)
        _refuse_other_classes(recipe, *infos)
        _refuse_other_range(recipe, *infos)
        _warn_of_shared_images(recipe, train.beton, test.beton)
        _warn_of_small_images(test.beton, f"data.test '{recipe.data.test}'", size)
    _warn_of_small_images(train.beton, f"data.train '{recipe.data.train}'", size)
    return PreparedData(train=train, test=test)


def used_of(recipe: Recipe, data: PreparedData) -> NDArray[np.int64] | None:
    """The samples of data.train that make up the training images, which data.order may choose; None: all."""
    return used_samples(data.train.beton, recipe.data.order)


def labelled_of(recipe: Recipe, data: PreparedData) -> NDArray[np.int64] | None:
    """The training images that have labels, ascending; None: all have."""
    return labelled_samples(data.train.beton, recipe.data.labels, used_of(recipe, data))


def scored_by(recipe: Recipe, data: PreparedData) -> NDArray[np.int64] | None:
    """The training images that evaluators learn from: those trained on to which their source gave a label; None:
    all."""
    return known_samples(data.train.beton, used_of(recipe, data))


def count_scored(train: str, evaluators: tuple[str, ...]) -> int:
    """Counts the images of data.train that evaluators learn from. Raises UserError where none has a label."""
    known = count_known(train)
    if not known:
        raise UserError(
            f"{', '.join(dict.fromkeys(evaluators))} learn from labels of the training images, and data.train "
            f"'{train}' has none; use data.test=null, and score the run later by images that have some: "
            "kilobatch eval RUN --train LABELLED --test TEST"
        )
    return known


def class_counts(recipe: Recipe, data: PreparedData) -> NDArray[np.int64]:
    """(classes,) the training images of each class: those with labels, of the ones that are trained on."""
    labels, labelled = read_labels(data.train.beton), labelled_of(recipe, data)
    some = used_of(recipe, data) if labelled is None else labelled
    classes = len(verify_beton(data.train.beton).classes)
    known = labels if some is None else labels[some]
    return np.bincount(known[known >= 0], minlength=classes)


def data_sha256(recipe: Recipe, data: PreparedData) -> str:
    """Of the training images and of which of them have labels."""
    used, labelled, images = used_of(recipe, data), labelled_of(recipe, data), data.train.sha256
    if used is not None:
        images = hashlib.sha256(images.encode() + b"used" + used.tobytes()).hexdigest()
    return images if labelled is None else hashlib.sha256(images.encode() + labelled.tobytes()).hexdigest()


def _prepare(spec: str, split: Split, size: int) -> PreparedFile:
    beton = prepare(spec, split, encoding_for_views(size)).absolute()
    return PreparedFile(beton=beton, sha256=verify_beton(beton).sha256)


def _warn_of_shared_images(recipe: Recipe, train: Path, test: Path) -> None:
    """Says so where test images are training images, byte for byte."""
    learned, asked = np.sort(read_fingerprints(train)), read_fingerprints(test)
    nearest = learned[np.minimum(np.searchsorted(learned, asked), len(learned) - 1)]  # np.isin takes 30 times as long
    if shared := int((nearest == asked).sum()):
        _warn_once(
            f"{shared:,} of the {len(asked):,} images of data.test '{recipe.data.test}' are training images as well "
            f"(data.train '{recipe.data.train}'), so that accuracies say less of new images; use other test images"
        )


def _warn_of_small_images(beton: Path, name: str, size: int) -> None:
    """Says so where more than half of the images have a shorter side below that of the views."""
    sides = read_short_sides(beton)
    small = int((sides < size).sum())
    if 2 * small <= len(sides):
        return
    encoding = encoding_for_views(size)
    _warn_once(
        f"data.views.size is {size}, but {small:,} of the {len(sides):,} images of {name} have fewer pixels on their "
        f"shorter side (half of them at most {np.median(sides):.0f}), so that views are enlarged; where "
        f"the originals are larger, convert them with --max-side {encoding.max_side} --min-side {encoding.min_side}, "
        "else use a smaller size"
    )


@cache
def _warn_once(message: str) -> None:
    """A launcher may prepare the same data several times: a pipeline does for each of its stages."""
    warn(message)


def class_numbers(train: list[str], test: list[str]) -> list[int] | None:
    """The number of each of the test's classes among the training's, by name; None: there is no such name, or no single
    one. Names that differ by their Unicode form alone are the same."""
    learned, asked = ([composed(name) for name in names] for names in (train, test))
    if learned == asked:
        return list(range(len(train)))
    numbers = {name: number for number, name in enumerate(learned)}
    unique = len(numbers) == len(learned) and len({*asked}) == len(asked)
    return [numbers[name] for name in asked] if unique and numbers.keys() >= {*asked} else None


def _refuse_other_classes(recipe: Recipe, train: BetonInfo, test: BetonInfo) -> None:
    if not train.classes or class_numbers(train.classes, test.classes) is not None:
        return  # training images without labels have nothing that could differ
    learned = {composed(name) for name in train.classes}
    foreign = [printable(name) for name in test.classes if composed(name) not in learned]
    which = f"only in data.test: {', '.join(foreign[:3])}" if foreign else "several classes have the same name"
    raise UserError(
        f"data.test '{recipe.data.test}' ({len(test.classes)} classes) has other classes than data.train "
        f"'{recipe.data.train}' ({len(train.classes)}), so that labels would not match; {which}; "
        "use test images of the same classes, or of some of them, or data.test=null"
    )


def _refuse_other_range(recipe: Recipe, train: BetonInfo, test: BetonInfo) -> None:
    """Raises UserError where images of more than 8 bits were brought to 8 bits in two ways."""
    ranges = [f"{info.value_range[0]:g},{info.value_range[1]:g}" for info in (train, test) if info.value_range]
    if len({*ranges}) == 2:
        raise UserError(
            f"pixels of more than 8 bits mean other things in data.train '{recipe.data.train}' (converted with --range "
            f"{ranges[0]}) and in data.test '{recipe.data.test}' (--range {ranges[1]}); convert both with one range: "
            "kilobatch convert --range LOW,HIGH"
        )


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths of its data and of the runs that it refers to, so that it can be used from any
    folder. Raises UserError for a data source of no known kind."""
    data, labels = recipe.data, recipe.data.labels
    if labels.list is not None:
        labels = labels.model_copy(update={"list": str(Path(labels.list).expanduser().absolute())})
    test = None if data.test is None else absolute_spec(data.test)
    data = data.model_copy(update={"train": absolute_spec(data.train), "test": test, "labels": labels})
    runs = {name: references.absolute_reference(where) for name, where in references.references(recipe).items()}
    for path in (data.train, data.test, labels.list, *runs.values()):
        if path is not None and not _is_text(path):
            raise UserError(
                f"{printable(path)} has bytes that are not UTF-8, which no recipe can hold; rename that folder or file"
            )
    return recipe.model_copy(update={"data": data, "method": recipe.method.model_copy(update=runs)})


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
