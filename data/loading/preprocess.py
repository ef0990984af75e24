"""Prepares single images for an encoder, as the loader of evaluators prepares those of a data set."""

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.data.files import unreadable
from kilobatch.data.loading.decode_crop import crop_plan_of, crop_planar
from kilobatch.data.loading.decoders import compile_once
from kilobatch.data.loading.image_table import ImageTable, encoded_table, one_image_table
from kilobatch.data.loading.loader import central_fraction, describe_input, input_images, plain_views
from kilobatch.data.sources.deep_pixels import UnknownRangeError
from kilobatch.data.sources.encoding import encoding_for_views
from kilobatch.data.sources.image_files import encode, encode_file, read_image, upright_pixels
from kilobatch.data.views.groups import ViewGroups, groups_of, largest_side

FORMS = "a PIL image, a path, or a uint8 array (H, W, 3) or (H, W)"


class Preprocess:
    """Makes of one image the tensor (3, size, size), float32 and normalised, that `kilobatch embed` and the evaluators
    make of it: the same bits on a CPU.

    A path, or what PIL's `Image.open` returns and nobody has decoded yet, is an image of `folder:`: the file's bytes
    are treated as `kilobatch convert` treats them, and decoded as the loader decodes. An array (H, W, 3) or (H, W),
    uint8, is an image of `npz:`. Any other PIL image is taken as its pixels, upright by its EXIF orientation: Pillow
    has decoded it, and its JPEG decoder differs from the loader's by about one of 255.

    views: size, mean, std and interpolation of the first group are used, and the sizes of all: images are stored for
    the largest. Raises UserError for an image that cannot be used.
    """

    def __init__(self, views: ViewGroups):
        first = groups_of(views)[0]
        self.views = plain_views(first.size, first.mean, first.std, first.interpolation)
        self._plan = crop_plan_of([self.views], 0, central_fraction(first.size))
        self._encoding = encoding_for_views(largest_side(views))

    def __call__(self, image: Image.Image | str | os.PathLike[str] | NDArray[np.uint8]) -> Tensor:
        size = self.views.size
        out, failed = np.empty(3 * size * size, np.float32), np.zeros(1, np.uint8)
        table = self._table(image)
        none = INDEX[:0], INDEX[:0], 0, out, failed[:0]
        compile_once(crop_planar, lambda: crop_planar(table, self._plan, 0, *none))
        crop_planar(table, self._plan, 0, INDEX, INDEX, 0, out, failed)
        if failed.any():  # libjpeg gave a warning: as the loader does, let Pillow read it
            crop_planar(one_image_table(self._pixels(image), 0), self._plan, 0, INDEX, INDEX, 0, out, failed)
        return torch.from_numpy(out).view(3, size, size)

    def __repr__(self) -> str:
        return f"Preprocess({describe_input(input_images(self.views))})"

    def _table(self, image: object) -> ImageTable:
        try:
            if (found := _file_of(image)) is not None:
                return encoded_table(encode_file(*found, self._encoding))
            if isinstance(image, Image.Image):
                return one_image_table(upright_pixels(image, self._encoding), 0)
            return encoded_table(encode(Image.fromarray(_rgb(image)), self._encoding))
        except UnknownRangeError:
            raise UserError(
                "the image has more than 8 bits a channel, and nothing says which values are black and white; give its "
                "pixels as a uint8 array"
            ) from None

    def _pixels(self, image: object) -> NDArray[np.uint8]:
        found = _file_of(image)
        assert found is not None, "pixels are encoded by Pillow, without a warning"
        return read_image(*found)


INDEX = np.zeros(1, np.int64)


def _file_of(image: object) -> tuple[bytes, str] | None:
    """The bytes and the name of an image's file; None: it is in memory. An image that Pillow has opened and not decoded
    yet stays as it is."""
    if isinstance(image, str | os.PathLike):
        path = Path(image).expanduser()
        try:
            return path.read_bytes(), str(path)
        except OSError as error:
            raise UserError(unreadable(path, error)) from error
    if isinstance(image, ImageFile.ImageFile) and image.fp is not None and getattr(image, "_im", None) is None:
        position = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()
        image.fp.seek(position)
        return data, str(getattr(image, "filename", "") or "the image")
    return None


def _rgb(image: object) -> NDArray[np.uint8]:
    """(H, W, 3) uint8. Raises UserError for anything but an array of images' values."""
    if not isinstance(image, np.ndarray):
        raise UserError(f"the image is a {type(image).__name__}; give {FORMS}")
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    colour = image.ndim == 3 and image.shape[2] == 3
    if image.dtype != np.uint8 or 0 in image.shape or not (colour or image.ndim == 2):
        raise UserError(f"the image is an array {image.shape} of {image.dtype}; give {FORMS}")
    return np.ascontiguousarray(image if colour else np.repeat(image[:, :, None], 3, axis=2))
