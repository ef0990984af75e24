"""Stored images to views, compiled: decode once, then cut, resize and flip each view, on a CPU colour it too.

Resizing is FFCV's, OpenCV's INTER_AREA: the mean over the area that a pixel covers where it shrinks, close to linear
interpolation where it enlarges. It differs from Pillow's antialiased bilinear filter, by 1 to 2 of 255 on photographs.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.augment.cpu.augment import augment
from kilobatch.data.augment.cpu.flip import mirror
from kilobatch.data.counter_rng import key
from kilobatch.data.loading.ffcv_bindings import imdecode, resize
from kilobatch.data.numba_jit import Bytes, Floats, Real, Whole, fast
from kilobatch.data.views.crop_box import crop_box

JPEG, RAW = 0, 1  # RGBImageField's modes


class Stored(NamedTuple):
    """Where the images lie. storage: (bytes,) uint8, read-only; the others: (samples,), by sample index."""

    storage: Bytes
    start: NDArray[np.int64]
    size: NDArray[np.int64]  # bytes
    height: NDArray[np.int64]
    width: NDArray[np.int64]
    mode: Bytes


class Shape(NamedTuple):
    """What is made of each image. plans: (views, COLUMNS); see data/views/columns.py."""

    plans: Floats
    seed: int
    central: float  # above 0: no chance, but the central square of this fraction of the shorter side
    scratch: int  # float32 numbers that `augment` works in


@fast
def decode(stored: Stored, sample: Whole, pixels: Bytes) -> bool:
    """JPEG file -> the first 3 * height * width of `pixels`; False if the decoder complained."""
    start, size = stored.start[sample], stored.size[sample]
    height, width = np.uint32(stored.height[sample]), np.uint32(stored.width[sample])
    source = stored.storage[start : start + size]
    return imdecode(source.ctypes.data, size, height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0) == 0


@fast
def view_of(image: Bytes, key: Whole, plan: Floats, central: Real, out: Bytes) -> None:
    """image (H, W, 3) -> out (size, size, 3): cut, resized and flipped."""
    height, width, _ = image.shape
    if central > 0:
        side = max(1, np.int64(np.rint(central * min(height, width))))
        top, left, rows, across, flip = (height - side) // 2, (width - side) // 2, side, side, False
    else:
        top, left, rows, across, flip = crop_box(key, height, width, plan)
    resize(
        *(0, image.ctypes.data, height, width, top, top + rows, left, left + across),
        *(out.ctypes.data, out.shape[0], out.shape[1]),
    )
    if flip:
        mirror(out)


@fast
def largest(stored: Stored, index: NDArray[np.int64]) -> Whole:
    """Pixels of the largest image among these."""
    most = np.int64(1)
    for i in range(len(index)):
        most = max(most, np.int64(stored.height[index[i]] * stored.width[index[i]]))
    return most


@fast
def image_of(stored: Stored, sample: Whole, pixels: Bytes) -> Bytes:
    """(H, W, 3): what `decode` left in pixels, or the stored pixels themselves."""
    height, width = stored.height[sample], stored.width[sample]
    if stored.mode[sample] == JPEG:
        return pixels[: 3 * height * width].reshape(height, width, 3)
    return stored.storage[stored.start[sample] :][: 3 * height * width].reshape(height, width, 3)


@fast
def cut_bytes(
    stored: Stored,
    shape: Shape,
    epoch: Whole,
    index: NDArray[np.int64],
    out: Bytes,
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
    epoch: Whole,
    index: NDArray[np.int64],
    out: Floats,
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
