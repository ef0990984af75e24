"""Source npz:FILE: images and labels in a file that NumPy wrote."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrays import Arrays

KEYS = "either images and labels, or x_train, y_train, x_test and y_test"


def open_npz(path: Path, split: str) -> Arrays:
    """Opens a split; a file with `images` and `labels` is all one split. `class_names`, if present, names the classes.

    Images are (N, H, W, 3) RGB or (N, H, W) or (N, H, W, 1) grey, uint8; labels (N,) or (N, 1) integers from 0.
    Raises UserError for any other file.
    """
    with _open(path) as file:
        x, y = _keys(file, path, split)
        images, labels = _array(file, path, x), _array(file, path, y)
        if images.dtype != np.uint8:
            raise UserError(f"npz:{path}: {x} is {images.dtype}; images must be uint8, 0 to 255")
        if images.ndim == 4 and images.shape[3] == 1:
            images = images[..., 0]
        if not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)) or 0 in images.shape:
            hint = ": move the channels last" if images.ndim == 4 and images.shape[1] in (1, 3) else ""
            raise UserError(f"npz:{path}: {x} has shape {images.shape}; images must be (N, H, W, 3) or (N, H, W){hint}")
        labels = _labels(labels, path, y)
        if len(images) != len(labels):
            raise UserError(
                f"npz:{path}: {x} has {len(images):,} images, {y} has {len(labels):,} labels; give one each"
            )
        return Arrays(images, labels, _classes(file, path))


def count_npz(path: Path, split: str) -> int:
    """Counts the images that open_npz will find, from the labels alone."""
    with _open(path) as file:
        key = _keys(file, path, split)[1]
        return len(_labels(_array(file, path, key), path, key))


def classes_of_npz(path: Path) -> list[str]:
    """Names of the classes that open_npz will find, from the labels alone."""
    with _open(path) as file:
        return _classes(file, path)


def _classes(file: np.lib.npyio.NpzFile, path: Path) -> list[str]:
    highest = max(int(_labels(_array(file, path, key), path, key).max()) for key in _label_keys(file))
    if "class_names" not in file.files:
        return [str(label) for label in range(highest + 1)]
    classes = [str(name) for name in _array(file, path, "class_names").reshape(-1)]
    if len(classes) <= highest:
        raise UserError(
            f"npz:{path}: class_names has {len(classes)} names, but the labels go up to {highest}; "
            "give a name for each, or leave class_names out"
        )
    return classes


def _open(path: Path) -> np.lib.npyio.NpzFile:
    if not path.exists():
        raise UserError(f"npz:{path}: there is no such file; numpy.savez writes one, with {KEYS}")
    try:
        file = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"npz:{path} cannot be read: {error.strerror or error}; check the file") from error
    except (ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"npz:{path} is not an .npz file, or cut short; numpy.savez writes one, with {KEYS}") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise UserError(f"npz:{path} holds a single array; write both with numpy.savez(FILE, images=…, labels=…)")
    return file


def _keys(file: np.lib.npyio.NpzFile, path: Path, split: str) -> tuple[str, str]:
    for x, y in ((f"x_{split}", f"y_{split}"), ("images", "labels")):
        if x in file.files and y in file.files:
            return x, y
    raise UserError(
        f"npz:{path} has no images for {split}: its keys are {', '.join(file.files) or 'none'}; needed: {KEYS}"
    )


def _label_keys(file: np.lib.npyio.NpzFile) -> list[str]:
    """The keys of all labels: a file's two splits have the same classes."""
    return [key for key in ("y_train", "y_test") if key in file.files] or ["labels"]


def _array(file: np.lib.npyio.NpzFile, path: Path, key: str) -> NDArray:
    try:
        return file[key]
    except ValueError:  # an array of objects: reading it would run code from the file
        raise UserError(f"npz:{path}: {key} holds Python objects; save it as a plain array of numbers") from None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"npz:{path}: {key} is damaged ({error}); write the file again") from None


def _labels(labels: NDArray, path: Path, key: str) -> NDArray[np.int64]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0 or labels.min() < 0:
        low = f" from {labels.min()}" if labels.dtype.kind in "iu" and labels.size else ""
        raise UserError(
            f"npz:{path}: {key} is {labels.dtype} of shape {labels.shape}{low}; labels must be (N,) integers from 0"
        )
    return labels.astype(np.int64)
