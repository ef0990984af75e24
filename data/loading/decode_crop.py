"""Makes views of stored images, compiled: decodes once, then crops, resizes, flips and (on CPUs) augments each view.

The parts that the views show are drawn first. Of a JPEG file with restart markers only the rows that one of them needs
are decoded. A part is cut out and then resized: no pixel outside it has an influence, as in torchvision.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.augment.cpu.augment import augment
from kilobatch.data.augment.cpu.patches import augment_patches
from kilobatch.data.counter_rng import key
from kilobatch.data.loading.ffcv_bindings import imdecode
from kilobatch.data.loading.image_table import JPEG, ImageTable, is_intact
from kilobatch.data.loading.jpeg_rows import cut_rows
from kilobatch.data.numba_jit import Bytes, Floats, Integer, Real, fast
from kilobatch.data.views.columns import BILINEAR
from kilobatch.data.views.crop_box import CropBox, crop_box
from kilobatch.data.views.resize import Box, ResizeScratch, make_scratch, resize

NOT_DECODED, NOT_INTACT = 1, 2  # why an image has no views: its decoder failed, or its bytes have changed


class CropPlan(NamedTuple):
    """The views to make of each image. plans: (views, COLUMNS); see data/views/columns.py."""

    plans: Floats
    seed: int
    central: float  # above 0: no random crop, but the central square of this fraction of the shorter side
    interpolation: int  # BILINEAR or BICUBIC
    scratch: int  # length of the array that `augment` works in, float32


class Scratch(NamedTuple):
    """Arrays to work in, large enough for any of the images."""

    file: Bytes  # a JPEG file's part
    pixels: Bytes
    boxes: NDArray[np.int64]  # (views, 5): each view's part of the image and whether it is flipped
    resizing: ResizeScratch


@fast
def make_all_scratch(table: ImageTable, crop_plan: CropPlan, index: NDArray[np.int64], size: Integer) -> Scratch:
    """For images `index` (n,) and views of this size."""
    bytes_, height, width, pixels = np.int64(0), np.int64(1), np.int64(1), np.int64(1)
    for i in range(len(index)):
        sample = index[i]
        rows, columns = np.int64(table.height[sample]), np.int64(table.width[sample])
        height, width, pixels = max(height, rows), max(width, columns), max(pixels, rows * columns)
        bytes_ = max(bytes_, np.int64(table.size[sample]) if table.mode[sample] == JPEG else 0)
    return Scratch(
        np.empty(bytes_, np.uint8),
        np.empty(3 * pixels, np.uint8),
        np.empty((len(crop_plan.plans), 5), np.int64),
        make_scratch(height, width, size, crop_plan.interpolation),
    )


@fast
def view_box(key: Integer, height: Integer, width: Integer, plan: Floats, central: Real) -> CropBox:
    """The part of an image that a view shows: top, left, rows, columns, and whether it is flipped."""
    if central > 0:
        side = max(1, np.int64(np.rint(central * min(height, width))))
        return (height - side) // 2, (width - side) // 2, side, side, False
    return crop_box(key, height, width, plan)


@fast
def draw_boxes(
    crop_plan: CropPlan, epoch: Integer, name: Integer, height: Integer, width: Integer, boxes: NDArray[np.int64]
) -> tuple[Integer, Integer]:
    """Fills in the boxes (views, 5) of an image; returns the first row and the last but one that some view shows."""
    top, end = height, np.int64(0)
    for view in range(len(boxes)):
        view_key, plan = key(crop_plan.seed, epoch, name, view), crop_plan.plans[view]
        first, left, rows, columns, flip = view_box(view_key, height, width, plan, crop_plan.central)
        boxes[view, 0], boxes[view, 1], boxes[view, 2], boxes[view, 3] = first, left, rows, columns
        boxes[view, 4] = 1 if flip else 0
        top, end = min(top, first), max(end, first + rows)
    return top, end


@fast
def load_image(
    table: ImageTable, crop_plan: CropPlan, epoch: Integer, sample: Integer, name: Integer, scratch: Scratch
) -> tuple[Integer, Bytes]:
    """Draws the views' boxes by the name, and decodes the rows that one of them shows, or more. Returns 0 and these
    rows (rows, W, 3), to which the boxes refer then, or the reason why there are none."""
    height, width, start, size = table.height[sample], table.width[sample], table.start[sample], table.size[sample]
    file, pixels, boxes = table.storage[start : start + size], scratch.pixels, scratch.boxes
    top, end = draw_boxes(crop_plan, epoch, name, height, width, boxes)
    if not is_intact(table, sample):
        return NOT_INTACT, pixels[:0].reshape(0, 0, 3)
    if table.mode[sample] != JPEG:
        return 0, file[: 3 * height * width].reshape(height, width, 3)
    address, rows = file.ctypes.data, height
    if len(table.checksum) > 0:  # else the rows that are drawn would decide whether damage is found
        cut = cut_rows(file, height, width, top, end, scratch.file)
        if cut.size > 0:
            address, size, rows = scratch.file.ctypes.data, cut.size, cut.rows
            for view in range(len(boxes)):
                boxes[view, 0] -= cut.first
    shape = np.uint32(rows), np.uint32(width)
    if imdecode(address, size, *shape, pixels.ctypes.data, *shape, 0, 0, 1, 1, 0, 0) != 0:
        return NOT_DECODED, pixels[:0].reshape(0, 0, 3)
    return 0, pixels[: 3 * rows * width].reshape(rows, width, 3)


@fast
def box_of(boxes: NDArray[np.int64], view: Integer) -> tuple[Box, bool]:
    return (boxes[view, 0], boxes[view, 1], boxes[view, 2], boxes[view, 3]), boxes[view, 4] == 1


@fast
def crop_view(image: Bytes, key: Integer, plan: Floats, central: Real, out: Bytes) -> None:
    """One bilinear view of image (H, W, 3) -> out (size, size, 3), as the loops below make it."""
    top, left, rows, columns, flip = view_box(key, image.shape[0], image.shape[1], plan, central)
    scratch = make_scratch(image.shape[0], image.shape[1], out.shape[0], BILINEAR)
    resize(image, (top, left, rows, columns), flip, BILINEAR, out, scratch)


@fast
def crop_bytes(
    table: ImageTable,
    crop_plan: CropPlan,
    epoch: Integer,
    index: NDArray[np.int64],
    names: NDArray[np.int64],
    out: Bytes,
    failed: Bytes,
) -> None:
    """Images `index` (n,), drawn for by `names` (n,) -> out (n, V, size, size, 3); `failed` (n,) gets NOT_DECODED or
    NOT_INTACT where there are no views, else stays."""
    scratch = make_all_scratch(table, crop_plan, index, out.shape[2])
    for i in range(len(index)):
        reason, image = load_image(table, crop_plan, epoch, index[i], names[i], scratch)
        if reason > 0:
            failed[i] = reason
            continue
        for view in range(len(crop_plan.plans)):
            box, flip = box_of(scratch.boxes, view)
            resize(image, box, flip, crop_plan.interpolation, out[i, view], scratch.resizing)


@fast
def crop_planar(
    table: ImageTable,
    crop_plan: CropPlan,
    epoch: Integer,
    index: NDArray[np.int64],
    names: NDArray[np.int64],
    out: Floats,
    failed: Bytes,
) -> None:
    """As `crop_bytes`, then augmented and normalised: out (n, V, 3, size, size)."""
    size = out.shape[3]
    scratch, cropped = make_all_scratch(table, crop_plan, index, size), np.empty((size, size, 3), np.uint8)
    planes = np.empty(crop_plan.scratch, np.float32)
    for i in range(len(index)):
        name = names[i]
        reason, image = load_image(table, crop_plan, epoch, index[i], name, scratch)
        if reason > 0:
            failed[i] = reason
            continue
        for view in range(len(crop_plan.plans)):
            view_key, plan = key(crop_plan.seed, epoch, name, view), crop_plan.plans[view]
            box, flip = box_of(scratch.boxes, view)
            resize(image, box, flip, crop_plan.interpolation, cropped, scratch.resizing)
            augment(cropped, view_key, plan, out[i, view], planes)


@fast
def crop_by_patch(
    table: ImageTable,
    crop_plan: CropPlan,
    epoch: Integer,
    index: NDArray[np.int64],
    names: NDArray[np.int64],
    out: Floats,
    failed: Bytes,
) -> None:
    """As `crop_planar`, where the second of two views is a jigsaw whose patches are coloured one by one."""
    size, plans = out.shape[3], crop_plan.plans
    cropped, planes = np.empty((len(index), 2, size, size, 3), np.uint8), np.empty(crop_plan.scratch, np.float32)
    crop_bytes(table, crop_plan, epoch, index, names, cropped, failed)
    for i in range(len(index)):
        if failed[i] == 0:
            augment(cropped[i, 0], key(crop_plan.seed, epoch, names[i], 0), plans[0], out[i, 0], planes)
            augment_patches(cropped[i, 1], key(crop_plan.seed, epoch, names[i], 1), plans[1], out[i, 1], planes)
