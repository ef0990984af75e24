"""Source digits: scikit-learn's handwritten digits."""

from functools import cached_property
from importlib.metadata import version

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import EncodedImage

DIGITS_SIZES = {"train": 1437, "test": 360}
DIGITS_SIDE = 32


class Digits:
    """1,797 real digits of 8x8 pixels in 17 greys, enlarged (bicubic) to 32x32; a fixed, stratified split.

    The images are made when the first is read: scikit-learn takes a second to import, which a process that finds them
    converted already need not spend.
    """

    names = None
    passed_over, fields = Arrays.passed_over, Arrays.NO_FIELDS
    classes = [str(digit) for digit in range(10)]

    def __init__(self, split: str) -> None:
        self.split = split

    def __len__(self) -> int:
        return DIGITS_SIZES[self.split]

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        return self._arrays[i]

    def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
        return self._arrays.encode(i, encoding)

    def deep_values(self, i: int) -> None:
        """Digits have 8 bits."""

    @property
    def labels(self) -> NDArray[np.int64]:
        return self._arrays.labels

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
