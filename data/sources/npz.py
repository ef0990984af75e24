"""Source npz:FILE: images and labels in a file that NumPy wrote, and further arrays with a row for each image."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton_layout import FIELD, ArrayForm
from kilobatch.data.beton_writer import Writer
from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrays import Arrays

KEYS = "either images and labels, or x_train, y_train, x_test and y_test"
NUMBERS = ("int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")  # that torch computes with
LONGEST_NAME = FIELD["name"].shape[0]  # of a field, in letters


def open_npz(path: Path, split: str) -> Arrays:
    """Opens a split; a file with `images` and `labels` is all one split. `class_names`, if present, names the classes.

    Images are (N, H, W, 3) RGB or (N, H, W) or (N, H, W, 1) grey, uint8; labels (N,) or (N, 1) integers from 0. Every
    other array is a field, (N, ...) numbers: `tokens`, or tokens_train and tokens_test beside x_train and x_test.
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
        fields = {name: _field(file, path, key, name, x, len(images)) for name, key in _fields(file, x).items()}
        return Arrays(images, labels, _classes(file, path), fields)


def labels_of_npz(path: Path, split: str) -> NDArray[np.int64]:
    """Labels of the images that open_npz will find."""
    with _open(path) as file:
        key = _keys(file, path, split)[1]
        return _labels(_array(file, path, key), path, key)


def fields_of_npz(path: Path, split: str) -> list[str]:
    """Names of the fields that open_npz will find."""
    with _open(path) as file:
        return list(_fields(file, _keys(file, path, split)[0]))


def forms_of_npz(path: Path, split: str) -> list[ArrayForm]:
    """Names, types and shapes of the fields that open_npz will find, from the headers of their arrays."""
    with _open(path) as file:
        return [_form(file, path, key, name) for name, key in _fields(file, _keys(file, path, split)[0]).items()]


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


def _fields(file: np.lib.npyio.NpzFile, x: str) -> dict[str, str]:
    """The keys of the arrays beside images and labels, by the names of their fields. x: the key of the images."""
    taken = {"images", "labels", "class_names", *(f"{axis}_{split}" for axis in "xy" for split in ("train", "test"))}
    others = [key for key in file.files if key not in taken]
    if x == "images":
        return {key: key for key in others}
    split = x.removeprefix("x")  # _train or _test
    other_split = "_test" if split == "_train" else "_train"
    return {key.removesuffix(split): key for key in others if not key.endswith(other_split)}


def _field(
    file: np.lib.npyio.NpzFile, path: Path, key: str, name: str, x: str, images: int
) -> NDArray[np.integer | np.floating]:
    """A field's array, of which each image has a row. Raises UserError for any other."""
    array = _array(file, path, key)
    leave = f"or leave {key} out of the file"
    if array.dtype.name not in NUMBERS:
        raise UserError(f"npz:{path}: {key} is {array.dtype}; save it as one of {', '.join(NUMBERS)}, {leave}")
    if array.shape[:1] != (images,) or 0 in array.shape:
        raise UserError(
            f"npz:{path}: {key} has shape {array.shape}, and {x} has {images:,} images; give each image a row, padded "
            f"to one shape, {leave}"
        )
    if not name.isidentifier() or not name.isascii() or len(name) > LONGEST_NAME or name in ("image", "label"):
        raise UserError(
            f"npz:{path}: {key} cannot be the name of a field beside image and label; use up to {LONGEST_NAME} "
            f"letters, digits and _, {leave}"
        )
    if (size := array[0].nbytes) > Writer.PAGE:
        raise UserError(f"npz:{path}: {key} has {size:,} bytes for an image; {Writer.PAGE:,} are allowed, {leave}")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _form(file: np.lib.npyio.NpzFile, path: Path, key: str, name: str) -> ArrayForm:
    assert file.zip is not None
    try:
        with file.zip.open(f"{key}.npy") as header:
            old = np.lib.format.read_magic(header)[0] == 1
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(header)
    except (ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"npz:{path}: {key} is damaged ({error}); write the file again") from None
    return ArrayForm(name, dtype.newbyteorder("<"), shape[1:])


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
