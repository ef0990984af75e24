"""Source torchvision:NAME:ROOT: a data set of torchvision.datasets that lies below ROOT already; nothing is fetched."""

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.errors import UserError, choices
from kilobatch.data.sources.encoded_files import digest_of_files
from kilobatch.data.sources.item_images import ItemImages, labels_of_items
from kilobatch.data.sources.label_names import numbered_classes, unlabelled
from kilobatch.data.sources.open_cache import opened_once
from kilobatch.data.sources.option_values import value_of_option
from kilobatch.data.sources.splits import Split

# The values of an argument `split` by the project's names, in order of preference.
NAMES: Mapping[Split, tuple[str, ...]] = {"train": ("train", "trainval"), "test": ("test", "val", "valid")}
LABELS = ("targets", "labels", "_labels", "y", "_targets")  # attributes that hold one for each image
NOT_OURS = ("root", "transform", "target_transform", "transforms", "download", "loader", "is_valid_file")


def open_torchvision(name: str, root: Path, split: Split, options: Mapping[str, str]) -> ItemImages:
    """Opens a data set by the name of its class. options: further arguments of the class, such as
    split=unlabeled. Raises UserError where there is no such class, or its files are not there.

    Its images are those of the class, decoded; labels are read without decoding where the class keeps them. Imports
    torchvision, and so torch.
    """
    where = f"torchvision:{name}:{root}"
    return opened_once(
        ItemImages,
        [root],
        lambda: _open(where, name, root, split, options),
        name,
        split,
        *sorted(options.items()),
    )


def _open(where: str, name: str, root: Path, split: Split, options: Mapping[str, str]) -> ItemImages:
    from torchvision import datasets

    if not root.is_dir():
        raise UserError(f"{where}: there is no folder {root}; give the one that holds the data set")
    names = [known for known in datasets.__all__ if isinstance(getattr(datasets, known), type)]
    if name not in names:
        raise UserError(f"{where}: torchvision.datasets has no {name}{choices(name, names)}")
    kind = getattr(datasets, name)
    found, arguments = _construct(where, name, kind, root, split, options)
    labels = _labels(where, found)
    names_of = _class_names(found)
    if (labels < 0).all():
        classes = unlabelled(0)[0]
    else:
        classes = numbered_classes(labels, names_of, where)

    def state() -> str:
        digest = digest_of_files(root, _files_below(root))
        digest.update(repr((name, sorted(arguments.items()), classes)).encode(errors="surrogateescape"))
        return digest.hexdigest()

    return ItemImages(where, found, labels, classes, state, alone=False)


def _construct(
    where: str, name: str, kind: Callable[..., Any], root: Path, split: Split, options: Mapping[str, str]
) -> tuple[Any, dict[str, Any]]:
    """The data set, and the arguments that it was made with."""
    takes = inspect.signature(kind).parameters
    allowed = sorted({*takes} - {*NOT_OURS})
    for option in options:
        if option not in allowed:
            raise UserError(f"{where}: {name} has no option '{option}'{choices(option, allowed)}")
    fixed = {option: value_of_option(text) for option, text in options.items()}
    if "download" in takes:
        fixed["download"] = False
    tries: list[dict[str, Any]] = [{}]
    if "train" in takes and "train" not in fixed:
        tries = [{"train": split == "train"}]
    elif "split" in takes and "split" not in fixed and name != "EMNIST":
        tries = [{"split": value} for value in NAMES[split]]
    elif split == "test" and not {"train", "split"} & {*options}:
        raise UserError(f"{where} has no test images of its own; hold some out by convert --hold-out, or name others")
    refusals: list[str] = []
    for attempt in tries:
        try:
            return kind(str(root), **attempt, **fixed), {**attempt, **fixed}
        except (RuntimeError, ValueError, OSError, TypeError, ImportError) as error:
            refusals.append(" ".join(str(error).split()))
            if not isinstance(error, ValueError):  # torchvision's for a split of another name
                break
    arguments = "".join(f", {key}={value!r}" for key, value in {**tries[0], **fixed}.items() if key != "download")
    made = f"{name}('{root}'{arguments}, download=True)"
    fetch = f'; fetch it with: python -c "from torchvision.datasets import {name}; {made}"'
    raise UserError(f"{where} cannot be opened: {refusals[-1][:300]}{fetch if 'download' in takes else ''}")


def _labels(where: str, found: Any) -> NDArray[np.int64]:
    """The labels that the class keeps, or those of all items: this decodes them."""
    for name in LABELS:
        kept = getattr(found, name, None)
        if kept is not None and len(kept) == len(found):
            labels = labels_of_items(where, np.asarray(kept).reshape(len(found), -1)[:, 0].tolist())
            # What is kept need not be what an item has: it is so for the first and the last, or all are asked.
            if all(_label(where, found, i) == labels[i] for i in {0, len(found) - 1}):
                return labels
            break
    return labels_of_items(where, (_label(where, found, i) for i in range(len(found))))


def _label(where: str, found: Any, i: int) -> Any:
    item = found[i]
    if not (isinstance(item, tuple) and len(item) == 2):
        raise UserError(
            f"{where}: its items are no pairs of image and label; use python:FILE.py:NAME, with a class that gives them"
        )
    label = item[1]
    return label.item() if hasattr(label, "item") and getattr(label, "ndim", 1) == 0 else label


def _class_names(found: Any) -> list[str] | None:
    names = getattr(found, "classes", None) or getattr(found, "categories", None)
    if not isinstance(names, list) or not names:
        return None
    return [" / ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in names]


def _files_below(root: Path) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(folder, name), root)  # noqa: PTH118 - faster, for a million files
        for folder, _, names in os.walk(root)
        for name in names
    )
