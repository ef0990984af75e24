"""Labels of images: numbers for names of classes, and the option `label`, which says where the names come from."""

import re
from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.errors import UserError
from kilobatch.data.sources.path_list import PathList
from kilobatch.data.sources.path_names import composed, in_one_order, printable

NO_LABEL = -1
NONE = "none"  # the value of the option `label` by which images have no labels
MOST_CLASSES = 1_000_000  # numbers of classes above it are something else, such as numbers of images
_NUMBER = re.compile(r"0|[1-9]\d{0,17}")
RuleOfLabels = Callable[[str], str | None]
Labels = tuple[list[str], NDArray[np.int32]]  # names of classes; positions among them, or NO_LABEL


class LabelNames:
    """Labels in the order of the images, which are added one by one by the names of their classes."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._labels = array("i")

    def append(self, name: str | None) -> None:
        """name: of the image's class; None or empty: it has no label."""
        if not name:
            self._labels.append(NO_LABEL)
            return
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self._numbers)
        self._labels.append(number)

    def finish(self) -> Labels:
        """The names of the classes, sorted: as numbers where all are numbers; and the labels, positions among them.
        Names that differ by their Unicode form alone are one class."""
        names = [printable(composed(name)) for name in self._numbers]
        numbers = all(_NUMBER.fullmatch(name) for name in names)
        classes = sorted({*names}, key=int) if numbers else in_one_order({*names})
        place = {name: position for position, name in enumerate(classes)}
        positions = np.array([*(place[name] for name in names), NO_LABEL], np.int32)  # the last one is NO_LABEL's
        return classes, positions[np.frombuffer(self._labels, np.int32)] if self._labels else np.zeros(0, np.int32)


def expression_of(value: str, where: str) -> RuleOfLabels | None:
    """The rule of an option `label` that is a regular expression: from an image's path to the name of its class, which
    is what the group matches; None for a path that it does not match. None: the value is no expression, having no
    group. where: the source, for messages. Raises UserError for an expression that cannot be used."""
    if "(" not in value:
        return None
    try:
        expression = re.compile(value)
    except re.error as error:
        raise UserError(
            f"{where}: label={value} is no regular expression: {error}; mend it, or use label=none"
        ) from None
    if expression.groups != 1:
        raise UserError(
            f"{where}: label={value} has {expression.groups} groups; put the name of the class into one, and write "
            "(?:…) for all others"
        )

    def name_of(path: str) -> str | None:
        found = expression.search(path)
        return None if found is None else found[1]

    return name_of


class LabelOption:
    """The option `label` of a source: a regular expression for paths, `none`, or what the source makes of it itself.

    own: whether labels are the source's own, so that it has to read them. Raises UserError for an expression that
    cannot be used. value: None where the option is not given; where: the source, for messages.
    """

    def __init__(self, value: str | None, where: str) -> None:
        self._value, self._where = value or "", where
        self._rule = None if value is None else expression_of(value, where)
        self.own = self._rule is None and value != NONE

    def apply(self, paths: PathList, read_own: Callable[[], Labels]) -> Labels:
        """Classes and labels of the images with these paths. read_own: gives the source's own."""
        if self._rule is not None:
            return labels_of_paths(paths, self._rule, self._where, self._value)
        return read_own() if self.own else unlabelled(len(paths))


def labels_of_paths(paths: PathList, rule: RuleOfLabels, where: str, value: str) -> Labels:
    """Classes and labels by a rule, as LabelNames.finish. Raises UserError where it names the class of no image."""
    found = LabelNames()
    for path in paths:
        found.append(rule(path))
    classes, labels = found.finish()
    if not classes:
        raise UserError(
            f"{where}: label={value} matches none of {len(paths):,} paths, such as '{printable(paths[0])}'; mend the "
            "expression, or use label=none"
        )
    return classes, labels


def unlabelled(images: int) -> Labels:
    """The classes and labels of images without labels."""
    return [], np.full(images, NO_LABEL, np.int32)


def numbered_classes(labels: NDArray[np.int64], names: list[str] | None, where: str) -> list[str]:
    """Names of classes for labels that are numbers already: those given or, without, the numbers up to the highest.
    Raises UserError where they are too few, or a number that cannot be one of a class."""
    highest = int(labels.max(initial=NO_LABEL))
    if int(labels.min(initial=0)) < NO_LABEL:
        raise UserError(f"{where}: a label is {labels.min()}; labels are numbers from 0, or -1 for none")
    if names is None:
        if highest >= MOST_CLASSES:
            raise UserError(f"{where}: labels go up to {highest:,}, which is no number of a class; take other labels")
        return [str(number) for number in range(highest + 1)]
    if len(names) <= highest:
        raise UserError(
            f"{where}: there are {len(names):,} names of classes, but the labels go up to {highest:,}; give a name for "
            "each"
        )
    return names
