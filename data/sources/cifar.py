"""Sources cifar10:ROOT and cifar100:ROOT, read from the python files that the authors distribute."""

from pathlib import Path

import numpy as np

from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrays import Arrays

CIFAR_SIZES = {"train": 50_000, "test": 10_000}
CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
_TORCHVISION_NAMES = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}


def open_cifar(name: str, root: Path, split: str) -> Arrays:
    """Opens CIFAR-10 or CIFAR-100 as torchvision stores it below `root`; torchvision verifies its checksums."""
    cifar_folder(name, root)
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        data = kind(str(root), train=split == "train", download=False)
    except RuntimeError:  # a checksum differs
        raise UserError(f"{name}:{root} is incomplete or damaged; remove it and {_download_hint(name, root)}") from None
    return Arrays(np.asarray(data.data, np.uint8), np.array(data.targets, np.int64), list(data.classes))


def cifar_folder(name: str, root: Path) -> Path:
    """The folder below `root` with torchvision's files. Raises UserError with the download command if it is missing."""
    folder = root / _TORCHVISION_NAMES[name][1]
    if root.name == folder.name and root.is_dir():
        raise UserError(f"{name}:{root} is the data set's own folder; give the one above it: {name}:{root.parent}")
    if not folder.is_dir():
        raise UserError(f"{name}:{root} has no {folder.name}/; {_download_hint(name, root)}")
    return folder


def _download_hint(name: str, root: Path) -> str:
    kind = _TORCHVISION_NAMES[name][0]
    return f"fetch it with: python -c \"from torchvision.datasets import {kind}; {kind}('{root}', download=True)\""
