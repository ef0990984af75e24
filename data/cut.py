"""Stored images to views, compiled: decode once, then cut, resize and flip each view, on a CPU colour it too.

Resizing is FFCV's, OpenCV's INTER_AREA: the mean over the area that a pixel covers where it shrinks, close to linear
interpolation where it enlarges. It differs from Pillow's antialiased bilinear filter, by 1 to 2 of 255 on photographs.
"""

import ctypes
from typing import NamedTuple

import ffcv.libffcv
import llvmlite.binding
import numpy as np
from numba import types
from numpy.typing import NDArray

from data.augment_planar import augment
from data.chance import key
from data.compiled import fast
from data.crop import crop_box

JPEG, RAW = 0, 1  # RGBImageField's modes


def external(name: str, result: types.Type, *arguments: types.Type) -> types.ExternalFunction:
    """A C function of FFCV's library, for compiled code.

    It is bound by name when code is loaded: an address in the code would be stale in the next process's copy of it.
    """
    symbol = f"ffcv_{name}"
    llvmlite.binding.add_symbol(symbol, ctypes.cast(ffcv.libffcv.lib[name], ctypes.c_void_p).value)
    return types.ExternalFunction(symbol, result(*arguments))


_imdecode = external(
    "imdecode",
    types.int32,  # 0, or -1 after an error or a warning
    *(types.uintp, types.uint64, types.uint32, types.uint32),  # JPEG file: address, bytes; height, width
    *(types.uintp, types.uint32, types.uint32),  # pixels: address; height, width
    *(types.uint32, types.uint32, types.uint32, types.uint32, types.uint32, types.uint32),  # offset, scale, crop, flip
)
_resize = external("resize", types.void, *(types.int64,) * 11)


class Stored(NamedTuple):
    """Where the images lie. storage: (bytes,) uint8, read-only; the others: (samples,), by sample index."""

    storage: NDArray[np.uint8]
    start: NDArray[np.int64]
    size: NDArray[np.int64]  # bytes
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    mode: NDArray[np.uint8]


class Shape(NamedTuple):
    """What is made of each image. plans: (views, COLUMNS); see data/plan.py."""

    plans: NDArray[np.float32]
    seed: int
    central: float  # above 0: no chance, but the central square of this fraction of the shorter side
    scratch: int  # float32 numbers that `augment` works in


@fast
def decode(stored: Stored, sample: int, pixels: NDArray[np.uint8]) -> bool:
    """JPEG file -> the first 3 * height * width of `pixels`; False if the decoder complained."""
    start, size = stored.start[sample], stored.size[sample]
    height, width = np.uint32(stored.height[sample]), np.uint32(stored.width[sample])
    source = stored.storage[start : start + size]
    return _imdecode(source.ctypes.data, size, height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0) == 0


@fast
def mirror(image: NDArray[np.uint8]) -> None:
    """(H, W, 3), left to right, in place."""
    height, width, _ = image.shape
    for y in range(height):
        for x in range(width // 2):
            for channel in range(3):
                other = image[y, width - 1 - x, channel]
                image[y, width - 1 - x, channel] = image[y, x, channel]
                image[y, x, channel] = other


@fast
def view_of(
    image: NDArray[np.uint8], key: int, plan: NDArray[np.float32], central: float, out: NDArray[np.uint8]
) -> None:
    """image (H, W, 3) -> out (size, size, 3): cut, resized and flipped."""
    height, width, _ = image.shape
    if central > 0:
        side = max(1, np.int64(np.rint(central * min(height, width))))
        top, left, rows, across, flip = (height - side) // 2, (width - side) // 2, side, side, False
    else:
        top, left, rows, across, flip = crop_box(key, height, width, plan)
    _resize(
        *(0, image.ctypes.data, height, width, top, top + rows, left, left + across),
        *(out.ctypes.data, out.shape[0], out.shape[1]),
    )
    if flip:
        mirror(out)


@fast
def largest(stored: Stored, index: NDArray[np.int64]) -> int:
    """Pixels of the largest image among these."""
    most = 1
    for sample in index:
        most = max(most, stored.height[sample] * stored.width[sample])
    return most


@fast
def image_of(stored: Stored, sample: int, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3): what `decode` left in pixels, or the stored pixels themselves."""
    height, width = stored.height[sample], stored.width[sample]
    if stored.mode[sample] == JPEG:
        return pixels[: 3 * height * width].reshape(height, width, 3)
    return stored.storage[stored.start[sample] :][: 3 * height * width].reshape(height, width, 3)


@fast
def cut_bytes(
    stored: Stored,
    shape: Shape,
    epoch: int,
    index: NDArray[np.int64],
    out: NDArray[np.uint8],
    failed: NDArray[np.bool_],
) -> None:
    """Images `index` (n,) -> out (n, V, size, size, 3); `failed` (n,) says which the decoder complained of."""
    pixels = np.empty(3 * largest(stored, index), np.uint8)
    for i in range(len(index)):
        sample = index[i]
        if stored.mode[sample] == JPEG and not decode(stored, sample, pixels):
            failed[i] = True
            continue
        image = image_of(stored, sample, pixels)
        for view in range(len(shape.plans)):
            view_of(image, key(shape.seed, epoch, sample, view), shape.plans[view], shape.central, out[i, view])


@fast
def cut_planar(
    stored: Stored,
    shape: Shape,
    epoch: int,
    index: NDArray[np.int64],
    out: NDArray[np.float32],
    failed: NDArray[np.bool_],
) -> None:
    """As `cut_bytes`, then augmented and normalised: out (n, V, 3, size, size)."""
    pixels = np.empty(3 * largest(stored, index), np.uint8)
    size = out.shape[3]
    cut = np.empty((size, size, 3), np.uint8)
    scratch = np.empty(shape.scratch, np.float32)
    for i in range(len(index)):
        sample = index[i]
        if stored.mode[sample] == JPEG and not decode(stored, sample, pixels):
            failed[i] = True
            continue
        image = image_of(stored, sample, pixels)
        for view in range(len(shape.plans)):
            name, plan = key(shape.seed, epoch, sample, view), shape.plans[view]
            view_of(image, name, plan, shape.central, cut)
            augment(cut, name, plan, out[i, view], scratch)
