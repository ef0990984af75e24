"""Images that Python objects give one by one: pictures of Pillow, arrays or tensors, alone or with labels."""

import io
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.deep_pixels import values_of
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import (
    BrokenImage,
    EncodedImage,
    encode,
    encode_file,
    read_image,
    upright_pixels,
)

ACCEPTED = "a PIL image, or uint8 pixels: an array (H, W, 3) or (H, W), or a tensor (3, H, W)"


class ItemImages:
    """A sequence of images, or of pairs of image and label.

    where: its name for messages; items: with len() and []; labels: (images,) from 0, or -1 for none; classes: their
    names; state: gives what changes when the images do. alone: one thread at a time asks for an item.
    """

    names = None
    fields = Arrays.NO_FIELDS
    passed_over: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        where: str,
        items: Any,
        labels: NDArray[np.int64],
        classes: list[str],
        state: Callable[[], str],
        alone: bool = True,
    ) -> None:
        self.where, self.items, self.labels, self.classes, self._state = where, items, labels, classes, state
        self._lock = threading.Lock() if alone else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        picture = self._picture(i)
        if isinstance(picture, bytes):
            return read_image(picture, self._name(i)), int(self.labels[i])
        return upright_pixels(picture, Encoding()), int(self.labels[i])

    def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
        picture = self._picture(i)
        if isinstance(picture, bytes):
            return encode_file(picture, self._name(i), encoding), int(self.labels[i])
        try:
            return encode(Image.fromarray(upright_pixels(picture, Encoding())), encoding), int(self.labels[i])
        except (OSError, ValueError, SyntaxError) as error:  # Pillow's, of a picture that was not decoded yet
            raise BrokenImage(f"{self._name(i)}: {error}") from error

    def deep_values(self, i: int) -> tuple[float, float] | None:
        picture = self._picture(i)
        return values_of(picture) if isinstance(picture, bytes) else None

    def fingerprint(self) -> str:
        return self._state()

    def _name(self, i: int) -> str:
        return f"{self.where}, item {i:,}"

    def _picture(self, i: int) -> Image.Image | bytes:
        """Item i as picture_of gives it. Raises BrokenImage for a file that the sequence cannot read."""
        try:
            with self._lock or nullcontext():
                return picture_of(image_of_item(self.items[i]), self._name(i))
        except OSError as error:  # Pillow's for what is no image, too
            raise BrokenImage(f"{self._name(i)}: {' '.join(str(error).split())}") from error


def image_of_item(item: Any) -> Any:
    """The image of an item that may be a pair of image and label."""
    return item[0] if isinstance(item, tuple | list) and item else item


def picture_of(image: Any, name: str) -> Image.Image | bytes:
    """An image as a picture of Pillow in 8 bits, or as the bytes of a file. Raises UserError, with its name, for
    anything else: other kinds, numbers and shapes, and other than one or three channels of an array."""
    if isinstance(image, Image.Image):
        if image.mode == "F" or image.mode.startswith("I"):  # more than 8 bits, whose range is measured over all
            file = io.BytesIO()
            image.save(file, "TIFF")
            return file.getvalue()
        return image
    torch = sys.modules.get("torch")  # who has not imported it has no tensor
    if torch is not None and isinstance(image, torch.Tensor):
        if image.ndim == 3 and image.shape[0] not in (1, 3):
            raise UserError(f"{name} is a tensor {tuple(image.shape)}: {_channels(image.shape[0])}")
        image = image.permute(1, 2, 0).numpy(force=True) if image.ndim == 3 else image.numpy(force=True)
    if not isinstance(image, np.ndarray):
        raise UserError(f"{name} is a {type(image).__name__}; give {ACCEPTED}")
    if image.dtype != np.uint8:
        raise UserError(f"{name} is {image.dtype}, not uint8 from 0 to 255; give {ACCEPTED} (leave out ToTensor)")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim == 3 and image.shape[2] != 3:
        raise UserError(f"{name} is an array {image.shape}: {_channels(image.shape[2])}")
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise UserError(f"{name} is an array {image.shape}; give {ACCEPTED}")
    return Image.fromarray(np.ascontiguousarray(image))


def _channels(number: int) -> str:
    return f"{number} channels, where images have three, or one that is grey; give {ACCEPTED}"


def labels_of_items(where: str, labels: Iterable[Any]) -> NDArray[np.int64]:
    """Labels as numbers; None is -1. Raises UserError for one that is no whole number."""
    found: list[int] = []
    for i, label in enumerate(labels):
        try:
            number = -1 if label is None else label.__index__()
        except (AttributeError, TypeError, ValueError):
            raise UserError(
                f"{where}, item {i:,} has the label {str(label)[:40]!r} ({type(label).__name__}); give a whole number "
                "from 0, -1 or None for no label, or an image alone"
            ) from None
        found.append(number)
    return np.array(found, np.int64)
