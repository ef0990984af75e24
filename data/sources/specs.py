"""Where images come from: folder:PATH, cifar10:ROOT, cifar100:ROOT, npz:FILE, digits.

Imports of scikit-learn and torchvision stand in the functions that need them: checking a recipe loads neither.
"""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton import verify
from kilobatch.data.errors import Refusal, did_you_mean
from kilobatch.data.sources.cifar import CIFAR_CLASSES, CIFAR_SIZES, cifar_folder, open_cifar
from kilobatch.data.sources.digits import DIGITS_SIZES, Digits
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.image_files import Stored
from kilobatch.data.sources.npz import classes_of_npz, count_npz, open_npz

Split = Literal["train", "test"]
FORMS = {
    "folder": "folder:PATH",
    "cifar10": "cifar10:ROOT",
    "cifar100": "cifar100:ROOT",
    "npz": "npz:FILE",
    "digits": "digits",
}


class Source(Protocol):
    """Labelled images in a fixed order."""

    @property
    def classes(self) -> list[str]:
        """Names; a label is a position in this list."""
        ...

    @property
    def names(self) -> list[str] | None:
        """Of the images; None where they have none."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        """Image i as upright RGB, (H, W, 3), and its label. Raises BrokenImage."""
        ...

    def stored(self, i: int, max_side: int | None, quality: int) -> tuple[Stored, int]:
        """Image i as a .beton holds it, and its label. Called by many threads. Raises BrokenImage."""
        ...

    def fingerprint(self) -> str:
        """Another text whenever the images may be others: what is converted is kept under it."""
        ...


def open_source(spec: str, split: Split) -> Source:
    """Opens `spec`, without decoding its images. Raises Refusal for what is not there or not in the right form."""
    scheme, where = _parse(spec)
    if scheme == "digits":
        return Digits(split)
    if scheme == "folder":
        return Folder(where, split)
    if scheme == "npz":
        return open_npz(where, split)
    return open_cifar(scheme, where, split)


def count(spec: str, split: Split) -> int:
    """How many images a source or a .beton file has; decodes none. Raises Refusal as opening it would."""
    if spec.endswith(".beton"):
        return verify(Path(spec).expanduser()).samples
    scheme, where = _parse(spec)
    if scheme == "digits":
        return DIGITS_SIZES[split]
    if scheme == "folder":
        return len(Folder(where, split))
    if scheme == "npz":
        return count_npz(where, split)
    cifar_folder(scheme, where)
    return CIFAR_SIZES[split]


def count_classes(spec: str, split: Split) -> int:
    """How many classes a source or a .beton file has; as count."""
    if spec.endswith(".beton"):
        return len(verify(Path(spec).expanduser()).classes)
    scheme, where = _parse(spec)
    if scheme == "digits":
        return 10
    if scheme == "folder":
        return len(Folder(where, split).classes)
    if scheme == "npz":
        return len(classes_of_npz(where))
    cifar_folder(scheme, where)
    return CIFAR_CLASSES[scheme]


def unshared(one: list[str], other: list[str]) -> str:
    """How two lists of classes that differ do, in words."""
    return ", ".join(sorted(set(one) ^ set(other))[:3]) or "none, but they stand in another order"


def folder_of(spec: str) -> Path | None:
    """The folder that holds the images; None where they lie in something else."""
    scheme, where = _parse(spec)
    return where if scheme == "folder" else None


def absolute(spec: str) -> str:
    """The same images, named so that the folder which a program stands in does not matter. Raises Refusal as count."""
    if spec.endswith(".beton"):
        return str(Path(spec).expanduser().absolute())
    scheme, where = _parse(spec)
    return spec if scheme == "digits" else f"{scheme}:{where.absolute()}"


def _parse(spec: str) -> tuple[str, Path]:
    scheme, colon, where = spec.partition(":")
    path = Path(where).expanduser()
    if scheme == "digits":
        if colon:
            raise Refusal(f"data source '{spec}': digits takes no path; write digits")
        return scheme, path
    if scheme in FORMS:
        if not where:
            raise Refusal(f"data source '{spec}' names no path; write {FORMS[scheme]}")
        return scheme, path
    if not colon and Path(spec).expanduser().exists():
        kind = "folder" if Path(spec).expanduser().is_dir() else "npz"
        near = f"; did you mean '{kind}:{spec}'?" if kind == "folder" or spec.endswith(".npz") else ""
    else:
        near = did_you_mean(scheme, FORMS)
    raise Refusal(f"data source '{spec}' is unknown{near} (allowed: {', '.join(FORMS.values())}, or a FILE.beton)")
