"""A source of images that lie in memory as one array, with further arrays of a row for each image."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import BrokenImage, EncodedImage, encode


class Arrays:
    """images: (N, H, W, 3) uint8 RGB, or (N, H, W) grey; labels: (N,) integers, positions in `classes`; fields: further
    arrays, (N, ...) of numbers."""

    names = None
    passed_over: Mapping[str, int] = MappingProxyType({})
    NO_FIELDS: Mapping[str, NDArray] = MappingProxyType({})

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        classes: list[str],
        fields: Mapping[str, NDArray] = NO_FIELDS,
    ):
        assert len(images) == len(labels) and images.dtype == np.uint8 and images.ndim in (3, 4)
        self.images, self.labels, self.classes, self.fields = images, labels, classes, fields

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        image = self.images[i]
        rgb = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
        return np.ascontiguousarray(rgb), int(self.labels[i])

    def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
        image, label = self[i]
        try:
            return encode(Image.fromarray(image), encoding), label
        except ValueError as error:
            raise BrokenImage(f"image {i}: {error}") from error

    def deep_values(self, i: int) -> None:
        """Arrays have 8 bits."""

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.images.shape, self.classes)).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        for name, array in sorted(self.fields.items()):
            digest.update(repr((name, array.dtype.str, array.shape)).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
