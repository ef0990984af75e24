"""Which training images have labels: pure functions of the labels, the share and the seed, or of a list of names."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton import labels_of, names_of, verify
from kilobatch.data.errors import Refusal
from kilobatch.data.loading.options import LabelOptions
from kilobatch.data.loading.sampling import order
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.specs import Split, count, count_classes, folder_of

UNLABELLED = -1  # the label of an image that has none


def labelled(beton: Path, options: LabelOptions) -> NDArray[np.int64] | None:
    """The samples of a .beton that have labels, ascending; None: all. Raises Refusal."""
    if options.list is not None:
        return listed(names_of(beton), Path(options.list).expanduser(), str(beton))
    return None if options.all else share(labels_of(beton), len(verify(beton).classes), options.share, options.seed)


def share(labels: NDArray[np.int64], classes: int, part: float, seed: int) -> NDArray[np.int64]:
    """Indices, ascending, of how_many(images, classes, part) of the labels (images,): as many of each class as can be.

    Each class's images are put in an order by (seed, class); all classes' first images come before any second, and so
    on, classes within a round in an order by the seed. The first of them all are taken. So two classes differ by at
    most one image, unless one has no more; and a smaller part is within a larger one.
    """
    turn = np.empty(len(labels), np.int64)  # the round in which an image would be taken
    for label in range(classes):
        members = np.flatnonzero(labels == label)
        turn[members[order(seed, label, len(members))]] = np.arange(len(members))
    place = np.empty(classes, np.int64)  # of each class within a round
    place[order(seed, classes, classes)] = np.arange(classes)
    first = np.lexsort((place[labels], turn))
    return np.sort(first[: how_many(len(labels), classes, part)])


def how_many(images: int, classes: int, part: float) -> int:
    """round(part × images), but one of each class at least."""
    return min(images, max(classes, round(part * images)))


def listed(names: Sequence[str], file: Path, where: str) -> NDArray[np.int64]:
    """Indices, ascending, of the images that the file names, one in a line: a path as in `names`, or its last part.

    Raises Refusal for lines that name no image, or that several have as their last part.
    """
    lines = _lines(file)
    by_path = {name: i for i, name in enumerate(names)}
    by_last: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        by_last.setdefault(name.rpartition("/")[2], []).append(i)
    found: set[int] = set()
    absent: list[str] = []
    for line in lines:
        if line in by_path:
            found.add(by_path[line])
        elif line not in by_last:
            absent.append(line)
        elif len(several := by_last[line]) == 1:
            found.add(several[0])
        else:
            raise Refusal(
                f"data.labels.list {file}: '{line}' is the name of {len(several):,} images of {where}, such as "
                f"{names[several[0]]} and {names[several[1]]}; write their paths instead"
            )
    if absent:
        raise Refusal(
            f"data.labels.list {file}: {len(absent):,} of its {len(lines):,} lines name no image of {where}, such as "
            f"{', '.join(absent[:3])} (an image there: {names[0]}); correct the list, or data.train"
        )
    return np.array(sorted(found), np.int64)


def count_labelled(spec: str, options: LabelOptions, split: Split = "train") -> int:
    """How many images of a source or a .beton have labels; decodes none. Raises Refusal as `labelled` would."""
    if options.list is None:
        images = count(spec, split)
        return images if options.all else how_many(images, count_classes(spec, split), options.share)
    if spec.endswith(".beton"):
        path = Path(spec).expanduser()
        return len(listed(names_of(path), Path(options.list).expanduser(), spec))
    folder = folder_of(spec)
    if folder is None:
        raise Refusal(
            f"data.labels.list {options.list}: the images of '{spec}' have no names; use data.labels.share, or images "
            "in folders: folder:PATH"
        )
    return len(listed(Folder(folder, split).names, Path(options.list).expanduser(), spec))


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip().removeprefix("./") for line in file.read_text("utf-8").splitlines()]
    except OSError as error:
        raise Refusal(f"data.labels.list {file} cannot be read: {error.strerror}; name a text file") from None
    except UnicodeDecodeError:
        raise Refusal(f"data.labels.list {file} is not a text file; write the name of an image in each line") from None
    if not any(lines):
        raise Refusal(f"data.labels.list {file} names no image; write the name of one in each line")
    return [line for line in lines if line]
