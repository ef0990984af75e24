"""Makes views of stored images, compiled: decodes once, then crops, resizes, flips and (on CPUs) augments each view.

Resizing is FFCV's: OpenCV's INTER_AREA, which takes the mean over the area that a pixel covers when it shrinks, and is
close to linear interpolation when it enlarges. It differs from Pillow's antialiased bilinear filter, by 1 to 2 of 255
on photographs.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.augment.cpu.augment import augment
from kilobatch.data.augment.cpu.flip import mirror
from kilobatch.data.counter_rng import key
from kilobatch.data.loading.ffcv_bindings import imdecode, resize
from kilobatch.data.loading.image_table import JPEG, ImageTable, is_intact
from kilobatch.data.numba_jit import Bytes, Floats, Integer, Real, fast
from kilobatch.data.views.crop_box import crop_box

NOT_DECODED, NOT_INTACT = 1, 2  # why an image has no views: its decoder failed, or its bytes have changed


class CropPlan(NamedTuple):
    """The views to make of each image. plans: (views, COLUMNS); see data/views/columns.py."""

    plans: Floats
    seed: int
    central: float  # above 0: no random crop, but the central square of this fraction of the shorter side
    scratch: int  # length of the array that `augment` works in, float32


@fast
def decode(table: ImageTable, sample: Integer, pixels: Bytes) -> bool:
    """Decodes a JPEG file into the first 3 * height * width of `pixels`; False after an error or a warning."""
    start, size = table.start[sample], table.size[sample]
    height, width = np.uint32(table.height[sample]), np.uint32(table.width[sample])
    source = table.storage[start : start + size]
    return imdecode(source.ctypes.data, size, height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0) == 0


@fast
def crop_view(image: Bytes, key: Integer, plan: Floats, central: Real, out: Bytes) -> None:
    """image (H, W, 3) -> out (size, size, 3): cropped, resized and flipped."""
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
def most_pixels(table: ImageTable, index: NDArray[np.int64]) -> Integer:
    """Pixels of the largest image among these."""
    most = np.int64(1)
    for i in range(len(index)):
        most = max(most, np.int64(table.height[index[i]] * table.width[index[i]]))
    return most


@fast
def pixels_of(table: ImageTable, sample: Integer, pixels: Bytes) -> Bytes:
    """(H, W, 3): the pixels that `decode` has written, or those that are stored without encoding."""
    height, width = table.height[sample], table.width[sample]
    if table.mode[sample] == JPEG:
        return pixels[: 3 * height * width].reshape(height, width, 3)
    return table.storage[table.start[sample] :][: 3 * height * width].reshape(height, width, 3)


@fast
def crop_bytes(
    table: ImageTable,
    crop_plan: CropPlan,
    epoch: Integer,
    index: NDArray[np.int64],
    out: Bytes,
    failed: Bytes,
) -> None:
    """Images `index` (n,) -> out (n, V, size, size, 3); `failed` (n,) gets NOT_DECODED or NOT_INTACT where there are
    no views, else stays."""
    pixels = np.empty(3 * most_pixels(table, index), np.uint8)
    for i in range(len(index)):
        sample = index[i]
        if not is_intact(table, sample):
            failed[i] = NOT_INTACT
            continue
        if table.mode[sample] == JPEG and not decode(table, sample, pixels):
            failed[i] = NOT_DECODED
            continue
        image = pixels_of(table, sample, pixels)
        for view in range(len(crop_plan.plans)):
            view_key, plan = key(crop_plan.seed, epoch, sample, view), crop_plan.plans[view]
            crop_view(image, view_key, plan, crop_plan.central, out[i, view])


@fast
def crop_planar(
    table: ImageTable,
    crop_plan: CropPlan,
    epoch: Integer,
    index: NDArray[np.int64],
    out: Floats,
    failed: Bytes,
) -> None:
    """As `crop_bytes`, then augmented and normalised: out (n, V, 3, size, size)."""
    pixels = np.empty(3 * most_pixels(table, index), np.uint8)
    size = out.shape[3]
    crop = np.empty((size, size, 3), np.uint8)
    scratch = np.empty(crop_plan.scratch, np.float32)
    for i in range(len(index)):
        sample = index[i]
        if not is_intact(table, sample):
            failed[i] = NOT_INTACT
            continue
        if table.mode[sample] == JPEG and not decode(table, sample, pixels):
            failed[i] = NOT_DECODED
            continue
        image = pixels_of(table, sample, pixels)
        for view in range(len(crop_plan.plans)):
            view_key, plan = key(crop_plan.seed, epoch, sample, view), crop_plan.plans[view]
            crop_view(image, view_key, plan, crop_plan.central, crop)
            augment(crop, view_key, plan, out[i, view], scratch)
