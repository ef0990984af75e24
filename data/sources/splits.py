"""Splits of a data set's root: which of its folders holds the training images, and which the test images.

| folder's name, in any case | split |
|---|---|
| `train`, `training`, `trainval` | train |
| `test`, `testing`, `val`, `validation`, `valid`, `eval`, `evaluation`, `dev` | test |

The same with a number, `set`, `data`, `split`, `images` or `standard` behind it: `train2017`, `test_set`; and with a
word before it, where one folder of each split has the same one: `seg_train` and `seg_test`. `valid`, `dev`, `eval` and
names with something behind them may also be classes: they are where they hold images, other folders beside them do,
too, and no other folder is named after a split. All others are splits or are refused.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from kilobatch.data.errors import UserError

Split = Literal["train", "test"]
_TRAIN = ("train", "training", "trainval")
_TEST = ("test", "testing", "val", "validation", "valid", "eval", "evaluation", "dev")
_WEAK = ("valid", "dev", "eval")
_NAME = re.compile(
    rf"(?:(.+?)[-_. ]+)?({'|'.join(_TRAIN + _TEST)})([-_. ]?(\d+|sets?|data|dataset|splits?|images?|imgs?|standard))?"
)

# The same with anything behind it, as in "train.X1"; but not "train (class)", which messages recommend for a class.
_LIKELY = re.compile(rf"(?:(.+?)[-_. ]+)?({'|'.join(_TRAIN + _TEST)})(?:[-_. ]?\d.*|[-_. ]+[^\W_].*)?")


@dataclass(frozen=True)
class Shape:
    """What a folder holds. folders: names of those in it; images: whether some lie directly in it, or further down."""

    folders: tuple[str, ...]
    images: bool
    images_below: bool


def split_folders(names: Iterable[str]) -> dict[str, Split]:
    """Those of a folder's folders that are named after splits, and the split that each holds."""
    parsed = {name: found for name in names if (found := _parse(name)) is not None}
    pairs = {word for word, split in parsed.values() if split == "train" and (word, "test") in parsed.values()}
    return {name: split for name, (word, split) in parsed.items() if not word or word in pairs}


def likely_splits(names: Iterable[str]) -> list[str]:
    """Folders that are named as splits are, but with something behind it that says nothing of splits: "train.X1" and
    "val.X". None unless both splits are among them, and all have one word before it, or none has."""
    found = {name: match for name in names if (match := _LIKELY.fullmatch(name.strip().casefold()))}
    kinds = {match[2] in _TRAIN for match in found.values()}
    return list(found) if len(kinds) == 2 and len({match[1] for match in found.values()}) == 1 else []


@lru_cache(maxsize=65_536)
def _parse(name: str) -> tuple[str, Split] | None:
    """The word before a split's name, and the split; None for any other name."""
    found = _NAME.fullmatch(name.strip().casefold())
    return None if found is None else (found[1] or "", "train" if found[2] in _TRAIN else "test")


def choose_split(root: Path, split: Split, shapes: Mapping[str, Shape], scheme: str = "folder") -> str | None:
    """The folder of the root that holds the split; None where the root's folders are classes.

    shapes: of all folders in the root, by their names; scheme: of the source, for the message. Raises UserError where
    it cannot be told, or is not there.
    """
    named = _named_after_splits(shapes)
    if not named:
        return None
    if len(named) == 1:
        _refuse_likely_class(root, next(iter(named)), shapes, scheme)
    found = [name for name, its in named.items() if its == split]
    if len(found) == 1:
        return found[0]
    kind = "training" if split == "train" else "test"
    there = " and ".join(f"{name}/" for name in named)
    if found:
        ways = " or ".join(f"{scheme}:{root / name}" for name in found)
        raise UserError(f"{scheme}:{root} has {len(found)} folders of {kind} images; name one of them: {ways}")
    if split == "test":
        raise UserError(
            f"{scheme}:{root} has no test images: beside {there} there is no folder named test or val; give another "
            f"folder (in a recipe, data.test=null does without)"
        )
    ways = " or ".join(f"{scheme}:{root / name}" for name in named)
    raise UserError(
        f"{scheme}:{root} has no training images: there is {there}, but no folder named train; give another folder, "
        f"or name one to train on it: {ways}"
    )


def refuse_splits_again(
    root: Path, folders: Iterable[str], shapes: Mapping[str, Shape], scheme: str = "folder"
) -> None:
    """Refuses a split's folder whose own folders are named after splits, as seg_train/seg_train. folders: the names of
    these; shapes: as for choose_split."""
    word = (_parse(root.name) or ("", "train"))[0]
    again = [name for name in folders if word and (_parse(name) or ("", "train"))[0] == word]
    for name in (*again, *_named_after_splits(shapes)):
        raise UserError(
            f"{scheme}:{root} is a split, and its folder '{name}' is named after one again; if that is a class, rename "
            f"it, for example to '{name} (class)', else give {scheme}:{root / name}"
        )


def refuse_mixed_splits(root: Path, within: str, folders: list[str], alone: bool, scheme: str = "folder") -> None:
    """Refuses a folder within a class folder that holds splits: training and test images would be taken together.

    within: the folder's path in the root; folders: the names of those in it; alone: whether it is the only class
    folder, and one of its folders that are named after splits holds folders itself.
    """
    named = split_folders(folders)
    if len(set(named.values())) == 2 or (alone and named):
        raise UserError(
            f"{scheme}:{root}: the class folder '{within.partition('/')[0]}' holds splits "
            f"({', '.join(f'{within}/{name}' for name in named)}), so that training and test images would be mixed; "
            f"give the folder above the splits, {scheme}:{root / within}, or one of them"
        )


def _named_after_splits(shapes: Mapping[str, Shape]) -> dict[str, Split]:
    named = split_folders(shapes)
    own = next(iter(named), "")
    if len(named) != 1 or shapes[own].folders or _strict(own):
        return named
    return {} if any(shape.images for name, shape in shapes.items() if name != own) else named


def _strict(name: str) -> bool:
    return name.casefold() in (*_TRAIN, *_TEST) and name.casefold() not in _WEAK


def _refuse_likely_class(root: Path, name: str, shapes: Mapping[str, Shape], scheme: str = "folder") -> None:
    """Refuses the one folder that is named after a split if the folders beside it hold images in the same way."""
    own, others = shapes[name], [shape for other, shape in shapes.items() if other != name]
    if own.folders:
        like = any(shape.images_below for shape in others)
        way_out = f"if it is a split, give {scheme}:{root / name}; if it is a class, rename it"
    else:
        like = any(shape.images or shape.images_below for shape in others)
        way_out = "if it is a class, rename it"
    if like:
        raise UserError(
            f"{scheme}:{root} has a folder '{name}' beside {len(others):,} others with images: it may be a split or a "
            f"class; {way_out}, for example to '{name} (class)'"
        )
