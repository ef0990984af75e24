"""The small data sets: scikit-learn's handwritten digits, and CIFAR through torchvision."""

from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from kilobatch.data.arrays import Arrays
from kilobatch.data.images import Stored
from kilobatch.data.refusal import Refusal

DIGITS_SIZES = {"train": 1437, "test": 360}
DIGITS_SIDE = 32
CIFAR_SIZES = {"train": 50_000, "test": 10_000}
CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
_CIFAR = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}


class Digits:
    """1,797 real digits of 8x8 pixels in 17 greys, enlarged (bicubic) to 32x32; a fixed, stratified split.

    Made when the first image is asked for: scikit-learn takes a second to import, in each process that only looks
    whether they are converted already.
    """

    names = None
    classes = [str(digit) for digit in range(10)]

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return DIGITS_SIZES[self.split]

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        return self._arrays[i]

    def stored(self, i: int, max_side: int | None, quality: int) -> tuple[Stored, int]:
        return self._arrays.stored(i, max_side, quality)

    def fingerprint(self) -> str:
        return f"{self.split} digits of scikit-learn {version('scikit-learn')}, enlarged by Pillow {PIL.__version__}"

    @cached_property
    def _arrays(self) -> Arrays:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        train, test = train_test_split(
            np.arange(len(labels)), test_size=DIGITS_SIZES["test"], stratify=labels, random_state=0
        )
        rows = test if self.split == "test" else train
        small = (pixels[rows].reshape(-1, 8, 8) * (255 / 16)).astype(np.float32)
        large = [
            np.asarray(Image.fromarray(image).resize((DIGITS_SIDE, DIGITS_SIDE), Image.Resampling.BICUBIC))
            for image in small
        ]
        images = np.stack(large).round().clip(0, 255).astype(np.uint8)
        return Arrays(images, labels[rows].astype(np.int64), self.classes)


def open_cifar(name: str, root: Path, split: str) -> Arrays:
    """CIFAR-10 or CIFAR-100 as torchvision lays it out below `root`; torchvision checks its checksums."""
    cifar_folder(name, root)
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    try:
        data = kind(str(root), train=split == "train", download=False)
    except RuntimeError:  # a checksum differs
        raise Refusal(f"{name}:{root} is incomplete or damaged; remove it and {_how(name, root)}") from None
    return Arrays(np.asarray(data.data, np.uint8), np.array(data.targets, np.int64), list(data.classes))


def cifar_folder(name: str, root: Path) -> Path:
    """Where torchvision keeps the data below `root`. Raises Refusal, saying how to get it, where it is not there."""
    folder = root / _CIFAR[name][1]
    if root.name == folder.name and root.is_dir():
        raise Refusal(f"{name}:{root} is the data set's own folder; give the one above it: {name}:{root.parent}")
    if not folder.is_dir():
        raise Refusal(f"{name}:{root} has no {folder.name}/; {_how(name, root)}")
    return folder


def _how(name: str, root: Path) -> str:
    kind = _CIFAR[name][0]
    return f"fetch it with: python -c \"from torchvision.datasets import {kind}; {kind}('{root}', download=True)\""
