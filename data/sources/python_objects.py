"""Source python:FILE.py:NAME: a data set of a Python file of yours. This alone of all sources runs foreign code."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.errors import UserError, choices
from kilobatch.data.sources.item_images import ItemImages, image_of_item, labels_of_items, picture_of
from kilobatch.data.sources.label_names import numbered_classes
from kilobatch.data.sources.open_cache import opened_once
from kilobatch.data.sources.option_values import value_of_option
from kilobatch.data.sources.splits import Split


def open_python(file: Path, name: str, split: Split, options: Mapping[str, str]) -> ItemImages:
    """Runs the file, and opens what NAME is: a sequence with len() and [], or a function or class that returns one. It
    is called with the options as arguments and, if it has an argument `split`, with "train" or "test".

    Items are images, or pairs of image and label. The sequence may have `classes`, the names of the classes, `labels`
    or `targets`, without which every item is asked for, and `fingerprint()`, a text that changes when the images do:
    without it every image is read to learn whether any has changed. Raises UserError.
    """
    where = f"python:{file}:{name}"
    if not file.is_file():
        raise UserError(f"{where}: there is no such file; give a Python file that makes a data set")
    return opened_once(
        ItemImages, [file], lambda: _open(where, file, name, split, options), name, split, *sorted(options.items())
    )


def _open(where: str, file: Path, name: str, split: Split, options: Mapping[str, str]) -> ItemImages:
    items = _object(where, file, name, split, options)
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise UserError(
            f"{where} is of type {type(items).__name__}, without len() or []; give a list or a Dataset with both"
        )
    if not len(items):
        raise UserError(f"{where} has no items; give a sequence of images")
    labels = _labels(where, items)
    names = getattr(items, "classes", None)
    names = None if names is None else [str(each) for each in names]
    classes = [] if (labels < 0).all() else numbered_classes(labels, names, where)
    return ItemImages(
        where, items, labels, classes, lambda: _fingerprint(where, items, labels, classes, file, split, options)
    )


def _object(where: str, file: Path, name: str, split: Split, options: Mapping[str, str]) -> Any:
    """Runs the file under a name of its own, so that it meets no module of that name."""
    module_name = f"kilobatch_source_{hashlib.sha256(str(file.absolute()).encode(errors='replace')).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{where}: {file.name} is no Python file; its name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        names = [known for known in vars(module) if not known.startswith("_")]
        raise UserError(f"{where}: {file} has no {name}{choices(name, names)}")
    found = getattr(module, name)
    if not callable(found):
        if options:
            raise UserError(f"{where} is no function or class, and takes no options; leave out {', '.join(options)}")
        return found
    takes = inspect.signature(found).parameters
    arguments: dict[str, Any] = {option: value_of_option(text) for option, text in options.items()}
    if "split" in takes and "split" not in arguments:
        arguments["split"] = split
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"{where} cannot be called with ({', '.join(arguments)}): {error}; give its arguments as options, as in "
            f"{where}?size=64"
        ) from None
    return found(**arguments)


def _labels(where: str, items: Any) -> NDArray[np.int64]:
    for name in ("labels", "targets"):
        kept = getattr(items, name, None)
        if kept is not None:
            kept = kept.tolist() if hasattr(kept, "tolist") else list(kept)
            if len(kept) != len(items):
                raise UserError(f"{where} has {len(items):,} items and {len(kept):,} {name}; give one each")
            return labels_of_items(where, kept)

    def label(i: int) -> Any:
        item = items[i]
        if not isinstance(item, tuple | list):
            return None
        if len(item) != 2:
            raise UserError(
                f"{where}, item {i:,} has {len(item)} parts; give pairs of image and label, or images alone"
            )
        return item[1]

    return labels_of_items(where, (label(i) for i in range(len(items))))


def _fingerprint(
    where: str,
    items: Any,
    labels: NDArray[np.int64],
    classes: list[str],
    file: Path,
    split: Split,
    options: Mapping[str, str],
) -> str:
    digest = hashlib.sha256(file.read_bytes())
    digest.update(repr((split, sorted(options.items()), classes)).encode(errors="surrogateescape"))
    digest.update(labels.tobytes())
    own = getattr(items, "fingerprint", None)
    if own is not None:
        digest.update(str(own() if callable(own) else own).encode(errors="surrogateescape"))
        return digest.hexdigest()
    for i in range(len(items)):
        picture = picture_of(image_of_item(items[i]), f"{where}, item {i:,}")
        data = (
            picture if isinstance(picture, bytes) else repr((picture.mode, picture.size)).encode() + picture.tobytes()
        )
        digest.update(data)
    return digest.hexdigest()
