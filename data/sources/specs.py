"""Opens and counts sources by their spec, such as folder:PATH, digits or tar:PATTERN?label=none (spec_syntax.py).

The path alone of a folder, or of an .npz file, stands for folder:PATH and npz:FILE.

Imports of scikit-learn and torchvision stand in the functions that need them: checking a recipe loads neither, but for
torchvision: and python:.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton import read_labels, verify_beton
from kilobatch.data.beton_layout import ArrayForm
from kilobatch.data.errors import UserError, nearest
from kilobatch.data.sources.cifar import CIFAR_CLASSES, CIFAR_SIZES, cifar_folder, open_cifar
from kilobatch.data.sources.digits import DIGITS_SIZES, Digits
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.hf_datasets import open_hf, split_of_saved
from kilobatch.data.sources.image_files import EncodedImage
from kilobatch.data.sources.image_list import open_csv, open_list
from kilobatch.data.sources.npz import classes_of_npz, fields_of_npz, forms_of_npz, labels_of_npz, open_npz
from kilobatch.data.sources.parquet_files import open_parquet
from kilobatch.data.sources.path_names import composed, existing_path, printable
from kilobatch.data.sources.python_objects import open_python
from kilobatch.data.sources.spec_syntax import FORMS, OPTIONS, SourceSpec, parse_known
from kilobatch.data.sources.splits import Split as Split
from kilobatch.data.sources.tar_shards import open_tar
from kilobatch.data.sources.torchvision_sets import open_torchvision
from kilobatch.data.sources.tree import Tree

BETON_SUFFIXES = (".beton", ".ffcv")  # the second in files of others


class Source(Protocol):
    """Images in a fixed order, with labels or without."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is a position in this list. Empty where no image has a label."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """(images,) the label of each; -1 for an image that has none."""
        ...

    @property
    def names(self) -> Sequence[str] | None:
        """Names of the images; None where they have no names."""
        ...

    @property
    def fields(self) -> Mapping[str, NDArray]:
        """Arrays of numbers beside images and labels, (N, ...) each, by name."""
        ...

    @property
    def passed_over(self) -> Mapping[str, int]:
        """How many files were found beside the images, by the reason why they are none."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        """Image i as upright RGB, (H, W, 3), and its label. Raises BrokenImage."""
        ...

    def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
        """Image i as a .beton holds it, and its label. Called by many threads. Raises BrokenImage, and
        UnknownRangeError where the image has more than 8 bits and the encoding no range."""
        ...

    def deep_values(self, i: int) -> tuple[float, float] | None:
        """The lowest and highest value of image i where it has more than 8 bits. Called by many threads."""
        ...

    def fingerprint(self) -> str:
        """A text that changes whenever the images may have changed; converted files are cached by it."""
        ...


def open_source(spec: str, split: Split) -> Source:
    """Opens `spec`, without decoding its images. Raises UserError where it does not exist or has the wrong form."""
    if is_beton(spec):
        raise UserError(f"{spec} is named as a .beton, which is no source of images; give what it was made from")
    parts = _parse(spec)
    match parts.scheme:
        case "digits":
            return Digits(split)
        case "folder":
            return Folder(parts.path, split)
        case "npz":
            return open_npz(parts.path, split)
        case "cifar10" | "cifar100":
            return open_cifar(parts.scheme, parts.path, split)
    return _open_with_options(parts, split)


def _open_with_options(parts: SourceSpec, split: Split) -> Source:
    options = parts.options
    match parts.scheme:
        case "tree":
            return Tree(parts.path, split, **options)
        case "list":
            return open_list(parts.path, options)
        case "csv":
            return open_csv(parts.path, options)
        case "tar":
            return open_tar(parts.path, options)
        case "parquet":
            return open_parquet(parts.path, options)
        case "hf":
            return open_hf(parts.path, split, options)
        case "torchvision":
            return open_torchvision(parts.name, parts.path, split, options)
        case _:
            return open_python(parts.path, parts.name, split, options)


def count_images(spec: str, split: Split) -> int:
    """Counts the images of a source or a .beton file; decodes none. Raises UserError as opening it would."""
    if is_beton(spec):
        return verify_beton(_path(spec, spec)).samples
    parts = _parse(spec)
    match parts.scheme:
        case "digits":
            return DIGITS_SIZES[split]
        case "npz":
            return len(labels_of_npz(parts.path, split))
        case "cifar10" | "cifar100":
            cifar_folder(parts.scheme, parts.path)
            return CIFAR_SIZES[split]
    return len(open_source(spec, split))


def count_classes(spec: str, split: Split) -> int:
    """Counts the classes of a source or a .beton file; as count_images. 0: no image has a label."""
    if not is_beton(spec) and (parts := _parse(spec)).scheme in CIFAR_CLASSES:
        cifar_folder(parts.scheme, parts.path)
        return CIFAR_CLASSES[parts.scheme]
    return len(class_names(spec, split))


def labels_of(spec: str, split: Split) -> NDArray[np.int64]:
    """Labels of the images of a source or a .beton file, in order; as count_images. -1: an image has none."""
    if is_beton(spec):
        return read_labels(_path(spec, spec))
    parts = _parse(spec)
    return labels_of_npz(parts.path, split) if parts.scheme == "npz" else open_source(spec, split).labels


def field_names(spec: str, split: Split) -> list[str]:
    """Names of the arrays that a source or a .beton file has beside images and labels; as count_images."""
    if is_beton(spec):
        return [field.name for field in verify_beton(_path(spec, spec)).fields]
    parts = _parse(spec)
    return sorted(fields_of_npz(parts.path, split)) if parts.scheme == "npz" else []


def field_forms(spec: str, split: Split) -> list[ArrayForm]:
    """Names, types and shapes of these arrays; as count_images. Reads none of their numbers."""
    if is_beton(spec):
        return [field.form for field in verify_beton(_path(spec, spec)).fields]
    parts = _parse(spec)
    return forms_of_npz(parts.path, split) if parts.scheme == "npz" else []


def class_names(spec: str, split: Split) -> list[str]:
    """Names of the classes of a source or a .beton file, in the order of their labels; as count_images."""
    if is_beton(spec):
        return verify_beton(_path(spec, spec)).classes
    parts = _parse(spec)
    if parts.scheme == "digits":
        return Digits.classes
    return classes_of_npz(parts.path) if parts.scheme == "npz" else open_source(spec, split).classes


def describe_class_difference(first: list[str], second: list[str]) -> str:
    """The difference of two unequal lists of classes, for a message: up to three names that only one of them has."""
    return ", ".join(sorted(set(first) ^ set(second))[:3]) or "none, but they stand in another order"


def differing_classes(first: list[str], second: list[str]) -> tuple[str, str] | None:
    """What the first difference of two lists of classes is in each of them, for a message; None: they are the same,
    but for the Unicode form of their names."""
    pairs = enumerate(zip(map(composed, first), map(composed, second), strict=False))
    number = next((number for number, (a, b) in pairs if a != b), None)
    if number is not None:
        ours, theirs = (f"'{printable(names[number])}' (class {number} of {len(names)})" for names in (first, second))
        return ours, theirs
    return None if len(first) == len(second) else (f"{len(first)} classes", f"{len(second)} classes")


def absolute_spec(spec: str) -> str:
    """The same spec with an absolute path, independent of the working folder. Raises UserError as count_images."""
    path = path_of(spec)
    return spec if path is None else spec_at(spec, path)


def path_of(spec: str) -> Path | None:
    """The absolute path of the file, folder or pattern that a spec names; None for digits, which have none. Raises
    UserError as count_images."""
    if is_beton(spec):
        return _path(spec, spec).absolute()
    parts = _parse(spec)
    return None if parts.scheme == "digits" else parts.path.absolute()


def spec_at(spec: str, path: Path) -> str:
    """A spec of the same kind, with the same options, at another path."""
    return str(path) if is_beton(spec) else _parse(spec).at(path)


def scheme_of(spec: str) -> str:
    """The word before the colon of a source, also where only its path is given: folder or npz."""
    scheme = spec.partition(":")[0]
    return scheme if scheme in FORMS else "npz" if spec.endswith(".npz") else "folder"


def has_labels_alone(spec: str) -> bool:
    """Whether the images of a source of this kind all have labels, so that they need not be read to know it."""
    return not is_beton(spec) and scheme_of(spec) not in OPTIONS


def has_test_split(spec: str) -> bool:
    """Whether a source of two splits or one, hf:, torchvision: or python:, has test images of its own."""
    parts = _parse(spec)
    if parts.scheme == "python":
        return False  # what it gives for test may be the same
    try:
        return count_images(spec, "test") > 0 and not {"split", "train"} & {*parts.options} and not _is_one_split(parts)
    except UserError:
        return False


def _is_one_split(parts: SourceSpec) -> bool:
    return parts.scheme == "hf" and split_of_saved(parts.path, "train", None) == parts.path


def is_beton(spec: str) -> bool:
    """Whether the spec names a .beton file, not a source; folder:PATH is one whatever PATH ends in."""
    return spec.endswith(BETON_SUFFIXES) and spec.partition(":")[0] not in FORMS


def _parse(spec: str) -> SourceSpec:
    scheme, colon, _ = spec.partition(":")
    if scheme == "digits":
        if colon:
            raise UserError(f"data source '{spec}': digits takes no path; write digits")
        return SourceSpec(scheme, Path())
    if scheme in FORMS:
        parts = parse_known(spec, _path)
        return replace(parts, path=existing_path(parts.path))
    bare = existing_path(_path(spec, spec))
    if os.path.isdir(bare) or (not colon and spec.endswith(".npz")):  # noqa: PTH112 - False for a name that is too long
        return SourceSpec(scheme_of(spec), bare)
    near = nearest(scheme, FORMS)
    there = os.path.exists(bare)  # noqa: PTH110 - as above
    absent = ", and it is a single file" if there else "" if colon else ", and there is no folder of this name"
    hint = f"; did you mean '{near}'?" if near and not there else absent
    raise UserError(f"data source '{spec}' is unknown{hint} (allowed: {', '.join(FORMS.values())}, or a FILE.beton)")


def _path(text: str, spec: str) -> Path:
    """A path that a user wrote, with ~ and ~NAME as the shell has them."""
    if "\0" in text:
        raise UserError(f"data source {spec!r} has a character in its path that no path has; write the path again")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # the home folder of no user
        raise UserError(
            f"data source '{spec}': there is no user '{text.partition('/')[0][1:]}' whose home folder this could be; "
            f"for a folder of this name write ./{text}"
        ) from None
