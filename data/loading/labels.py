"""Selects the images that are trained on, and those that have labels: pure functions of labels, options and names."""

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton import read_labels, read_names, verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.loading.options import LabelOptions, OrderOptions
from kilobatch.data.loading.sampling import epoch_order, images_by_class, long_tail
from kilobatch.data.sources.path_names import composed, escaped
from kilobatch.data.sources.specs import (
    Split,
    count_classes,
    count_images,
    has_labels_alone,
    is_beton,
    labels_of,
    open_source,
)

UNLABELLED = -1  # the label of an image that has none


def used_samples(beton: Path, order: OrderOptions | None) -> NDArray[np.int64] | None:
    """The samples of a .beton that make up the training images, ascending; None: all. Raises UserError."""
    return None if order is None else _long_tailed(order, lambda: read_labels(beton))


def labelled_samples(
    beton: Path, options: LabelOptions, used: NDArray[np.int64] | None = None
) -> NDArray[np.int64] | None:
    """The samples of a .beton that have labels, ascending; None: all. used: the training images, of which a share is
    taken; None: all samples. An image to which its source gave no label never has one. Raises UserError."""
    known = known_samples(beton, used)
    if options.list is not None:
        listed = samples_in_list(read_names(beton), Path(options.list).expanduser(), str(beton))
        return listed if known is None else np.intersect1d(listed, known)
    if options.all:
        return None if known is None or (used is not None and len(known) == len(used)) else known
    labels, classes = read_labels(beton), len(verify_beton(beton).classes)
    if known is None:
        return balanced_share(labels, classes, options.share, options.seed)
    return known[balanced_share(labels[known], classes, options.share, options.seed)]


def known_samples(beton: Path, used: NDArray[np.int64] | None = None) -> NDArray[np.int64] | None:
    """The samples of `used` (None: all of a .beton) to which the source gave a label, ascending; None: all samples of
    the file. Raises UserError."""
    known = read_labels(beton) >= 0
    if used is not None:
        return used[known[used]]
    return None if known.all() else np.flatnonzero(known)


def balanced_share(labels: NDArray[np.int64], classes: int, part: float, seed: int) -> NDArray[np.int64]:
    """Selects a class-balanced share of the labels (images,): share_size(images, classes, part) indices, ascending.

    Each class's images are put in an order by (seed, class). Then rounds take one image of each class, the classes in
    an order by the seed, until there are enough. So two classes differ by at most one image, unless one has no more
    images; and a smaller part lies within a larger one of the same seed.
    """
    rounds = np.empty(len(labels), np.int64)  # the round in which each image would be taken
    for label, members in images_by_class(labels).items():
        rounds[members[epoch_order(seed, label, len(members))]] = np.arange(len(members))
    place = np.empty(classes, np.int64)  # of each class within a round
    place[epoch_order(seed, classes, classes)] = np.arange(classes)
    ranking, size = rounds * classes + place[labels], share_size(len(labels), classes, part)  # no two are equal
    return np.sort(np.argpartition(ranking, size - 1)[:size])


def share_size(images: int, classes: int, part: float) -> int:
    """Number of labelled images: round(part × images), but at least one of each class."""
    return min(images, max(classes, round(part * images)))


def samples_in_list(names: Sequence[str], file: Path, where: str) -> NDArray[np.int64]:
    """Indices, ascending, of the images that a text file names, one a line: by a path as in `names`, or its last part.

    A line may also be the name as the disk has it, where `names` has characters escaped, or in another Unicode form.
    Raises UserError for a line that names no image, or that is the last part of several paths.
    """
    lines = _lines(file)
    table = _NameTable(names)
    found: set[int] = set()
    absent: list[str] = []
    for line in lines:
        several = table.find(line)
        if not several:
            absent.append(line)
        elif len(several) == 1:
            found.add(several[0])
        else:
            raise UserError(
                f"data.labels.list {file}: '{line}' is the name of {len(several):,} images of {where}, such as "
                f"{names[several[0]]} and {names[several[1]]}; write their paths instead"
            )
    if absent:
        raise UserError(
            f"data.labels.list {file}: {len(absent):,} of its {len(lines):,} lines name no image of {where}, such as "
            f"{', '.join(absent[:3])} (an image there: {names[0]}); correct the list, or data.train"
        )
    return np.array(sorted(found), np.int64)


def count_used(spec: str, order: OrderOptions | None, split: Split = "train") -> int:
    """Counts the training images that data.order leaves of a source or a .beton; decodes none. Raises UserError."""
    used = None if order is None else _long_tailed(order, lambda: labels_of(spec, split))
    return count_images(spec, split) if used is None else len(used)


def count_labelled(spec: str, options: LabelOptions, order: OrderOptions | None = None, split: Split = "train") -> int:
    """Counts the training images of a source or a .beton that have labels; decodes none. Raises UserError as
    labelled_samples."""
    used = None if order is None else _long_tailed(order, lambda: labels_of(spec, split))
    if options.list is None:
        images = count_known(spec, split) if used is None else len(used)  # a long-tailed part has labels alone
        return images if options.all else share_size(images, count_classes(spec, split), options.share)
    listed = _listed(spec, options.list, split)
    if has_labels_alone(spec):
        return len(listed if used is None else np.intersect1d(listed, used))
    known = np.flatnonzero(labels_of(spec, split) >= 0)
    return len(np.intersect1d(listed, known if used is None else np.intersect1d(known, used)))


def count_known(spec: str, split: Split = "train") -> int:
    """Counts the images of a source or a .beton to which their source gave a label; decodes none. Raises UserError."""
    return count_images(spec, split) if has_labels_alone(spec) else int((labels_of(spec, split) >= 0).sum())


def _long_tailed(order: OrderOptions, labels: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64] | None:
    """The samples of the order's long-tailed part; None: it has none. Raises UserError where images have no labels."""
    tail = order.long_tailed
    if tail is None:
        return None
    known = labels()
    if missing := int((known < 0).sum()):
        raise UserError(
            f"data.order.long_tailed takes images by their labels, and {missing:,} of {len(known):,} have none; use "
            "images that all have one, or data.order=null"
        )
    return long_tail(known, tail.ratio, tail.form, tail.seed)


def _listed(spec: str, list_file: str, split: Split) -> NDArray[np.int64]:
    """The images of a source or a .beton that a text file names."""
    file = Path(list_file).expanduser()
    if is_beton(spec):
        return samples_in_list(read_names(Path(spec).expanduser()), file, spec)
    names = open_source(spec, split).names
    if names is None:
        raise UserError(
            f"data.labels.list {list_file}: the images of '{spec}' have no names; use data.labels.share, or images "
            "in folders: folder:PATH"
        )
    return samples_in_list(names, file, spec)


class _NameTable:
    """Positions of images by their names, by the last parts of these, and by both in one Unicode form."""

    def __init__(self, names: Sequence[str]) -> None:
        self.by_path = {name: i for i, name in enumerate(names)}
        self.by_last: dict[str, list[int]] = {}
        self.by_composed: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            last = name.rpartition("/")[2]
            self.by_last.setdefault(last, []).append(i)
            if not name.isascii():
                for form in {composed(name), composed(last)}:
                    self.by_composed.setdefault(form, []).append(i)

    def find(self, line: str) -> list[int]:
        """The images that a line of a list may mean: those that are named exactly so, else those nearly so."""
        plain = dict.fromkeys(form.removeprefix("./") for form in (line, line.strip()))
        forms = list(dict.fromkeys([*plain, *(escaped(form) for form in plain)]))
        for form in forms:
            if form in self.by_path:
                return [self.by_path[form]]
            if form in self.by_last:
                return self.by_last[form]
        return next((self.by_composed[text] for text in map(composed, forms) if text in self.by_composed), [])


def _lines(file: Path) -> list[str]:
    try:
        data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"data.labels.list {file} cannot be read: {error.strerror}; name a text file") from None
    if b"\0" in data:
        raise UserError(f"data.labels.list {file} is not a text file; write the name of an image in each line")
    # Split at line feeds alone, since names may hold other separators; bytes that are not UTF-8 may stand in names.
    lines = [line.removesuffix("\r") for line in data.decode("utf-8", "surrogateescape").split("\n")]
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"data.labels.list {file} names no image; write the name of one in each line")
    return lines
