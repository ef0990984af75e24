"""Makes views of stored images, compiled: decodes once, then crops, resizes, flips and (on CPUs) augments each view.

The parts that the views show are drawn first. Of a JPEG file with restart markers only the rows that one of them needs
are decoded. A part is cut out and then resized: no pixel outside it has an influence, as in torchvision.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.augment.cpu.augment import augment, scratch_length
from kilobatch.data.augment.cpu.patches import augment_patches
from kilobatch.data.counter_rng import key
from kilobatch.data.loading.ffcv_bindings import imdecode
from kilobatch.data.loading.image_table import JPEG, ImageTable, is_intact
from kilobatch.data.loading.jpeg_rows import cut_rows
from kilobatch.data.numba_jit import Bytes, Floats, Integer, Real, exact, fast
from kilobatch.data.views.columns import (
    BEFORE,
    BILINEAR,
    EACH,
    FIRST,
    INTERPOLATION,
    SIZE,
    TIED_CROP,
    TIED_FLIP,
    WITHIN,
)
from kilobatch.data.views.crop_box import CropBox, crop_box, draw_flip
from kilobatch.data.views.draws import draw_all
from kilobatch.data.views.groups import plans_of, rows_of
from kilobatch.data.views.options import Views
from kilobatch.data.views.resize import Box, ResizeScratch, allocate, make_scratch, resize, scratch_sizes

NOT_DECODED, NOT_INTACT = 1, 2  # why an image has no views: its decoder failed, or its bytes have changed


class CropPlan(NamedTuple):
    """The views to make of each image, of all groups. plans: (views, COLUMNS); rows: (views, ROW_COLUMNS), where each
    lies in a batch; see data/views/columns.py."""

    plans: Floats
    rows: NDArray[np.int64]
    seed: int
    central: float  # above 0: no random crop, but the central square of this fraction of the shorter side
    scratch: int  # length of the array that `augment` works in, float32


def crop_plan_of(groups: Sequence[Views], seed: int, central: float) -> CropPlan:
    """Always of the same types, as the loops are compiled once more for any other."""
    scratch = max(int(scratch_length(group)) for group in groups)
    return CropPlan(plans_of(groups), rows_of(groups), int(seed), float(central), scratch)


@exact
def elements_of_views(crop_plan: CropPlan) -> Integer:
    """The elements of all views of one image."""
    return crop_plan.rows[-1, BEFORE] + crop_plan.rows[-1, EACH]


@exact
def start_of_view(crop_plan: CropPlan, images: Integer, image: Integer, view: Integer) -> Integer:
    """The first element of a view of an image, in a batch of so many images."""
    row = crop_plan.rows[view]
    return images * row[BEFORE] + image * row[EACH] + row[WITHIN]


@exact
def view_keys(crop_plan: CropPlan, epoch: Integer, sample: Integer, view: Integer) -> tuple[Integer, Integer]:
    """The key of a view, and that of its group's first view."""
    first = crop_plan.rows[view, FIRST]
    return key(crop_plan.seed, epoch, sample, view), key(crop_plan.seed, epoch, sample, first)


class Scratch(NamedTuple):
    """Arrays to work in, large enough for any of the images."""

    file: Bytes  # a JPEG file's part
    pixels: Bytes
    boxes: NDArray[np.int64]  # (views, 5): each view's part of the image and whether it is flipped
    resizing: ResizeScratch


@fast
def make_all_scratch(table: ImageTable, crop_plan: CropPlan, index: NDArray[np.int64]) -> Scratch:
    """For all views of images `index` (n,)."""
    bytes_, height, width, pixels = np.int64(0), np.int64(1), np.int64(1), np.int64(1)
    for i in range(len(index)):
        sample = index[i]
        rows, columns = np.int64(table.height[sample]), np.int64(table.width[sample])
        height, width, pixels = max(height, rows), max(width, columns), max(pixels, rows * columns)
        bytes_ = max(bytes_, np.int64(table.size[sample]) if table.mode[sample] == JPEG else 0)
    largest = scratch_sizes(height, width, crop_plan.rows[0, SIZE], crop_plan.rows[0, INTERPOLATION])
    for row in crop_plan.rows[1:]:
        sizes = scratch_sizes(height, width, row[SIZE], row[INTERPOLATION])
        largest = max(largest[0], sizes[0]), max(largest[1], sizes[1]), max(largest[2], sizes[2])
    return Scratch(
        np.empty(bytes_, np.uint8),
        np.empty(3 * pixels, np.uint8),
        np.empty((len(crop_plan.plans), 5), np.int64),
        allocate(largest),
    )


@fast
def view_box(key: Integer, first: Integer, height: Integer, width: Integer, plan: Floats, central: Real) -> CropBox:
    """The part of an image that a view shows: top, left, rows, columns, and whether it is flipped. first: the key of
    its group's first view, which draws what is tied."""
    if central > 0:
        side = max(1, np.int64(np.rint(central * min(height, width))))
        return (height - side) // 2, (width - side) // 2, side, side, False
    top, left, rows, columns, _ = crop_box(first if plan[TIED_CROP] > 0 else key, height, width, plan)
    return top, left, rows, columns, draw_flip(first if plan[TIED_FLIP] > 0 else key, plan)


@fast
def draw_boxes(
    crop_plan: CropPlan, epoch: Integer, name: Integer, height: Integer, width: Integer, boxes: NDArray[np.int64]
) -> tuple[Integer, Integer]:
    """Fills in the boxes (views, 5) of an image; returns the first row and the last but one that some view shows."""
    top, end = height, np.int64(0)
    for view in range(len(boxes)):
        own, first = view_keys(crop_plan, epoch, name, view)
        begin, left, rows, columns, flip = view_box(own, first, height, width, crop_plan.plans[view], crop_plan.central)
        boxes[view, 0], boxes[view, 1], boxes[view, 2], boxes[view, 3] = begin, left, rows, columns
        boxes[view, 4] = 1 if flip else 0
        top, end = min(top, begin), max(end, begin + rows)
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
    top, left, rows, columns, flip = view_box(key, key, image.shape[0], image.shape[1], plan, central)
    scratch = make_scratch(image.shape[0], image.shape[1], out.shape[0], BILINEAR)
    resize(image, (top, left, rows, columns), flip, BILINEAR, out, scratch)


@fast
def crop_bytes(
    table: ImageTable,
    crop_plan: CropPlan,
    epoch: Integer,
    index: NDArray[np.int64],
    names: NDArray[np.int64],
    at: Integer,
    out: Bytes,
    failed: Bytes,
) -> None:
    """Makes the views of images `index` (n,), drawn for by `names` (n,), which are numbers `at` and following of a
    batch.

    out: the batch, flat: of each group (images, V, size, size, 3), one group after the other. `failed` (n,) gets
    NOT_DECODED or NOT_INTACT where there are no views, else stays.
    """
    scratch, images = make_all_scratch(table, crop_plan, index), len(out) // elements_of_views(crop_plan)
    for i in range(len(index)):
        reason, image = load_image(table, crop_plan, epoch, index[i], names[i], scratch)
        if reason > 0:
            failed[i] = reason
            continue
        for view in range(len(crop_plan.plans)):
            size, start = crop_plan.rows[view, SIZE], start_of_view(crop_plan, images, at + i, view)
            made = out[start : start + 3 * size * size].reshape(size, size, 3)
            box, flip = box_of(scratch.boxes, view)
            resize(image, box, flip, crop_plan.rows[view, INTERPOLATION], made, scratch.resizing)


@fast
def crop_planar(
    table: ImageTable,
    crop_plan: CropPlan,
    epoch: Integer,
    index: NDArray[np.int64],
    names: NDArray[np.int64],
    at: Integer,
    out: Floats,
    failed: Bytes,
) -> None:
    """As `crop_bytes`, then augmented and normalised: of each group (images, V, 3, size, size)."""
    scratch, images = make_all_scratch(table, crop_plan, index), len(out) // elements_of_views(crop_plan)
    room = np.empty(3 * crop_plan.rows[:, SIZE].max() ** 2, np.uint8)
    planes = np.empty(crop_plan.scratch, np.float32)
    for i in range(len(index)):
        name = names[i]
        reason, image = load_image(table, crop_plan, epoch, index[i], name, scratch)
        if reason > 0:
            failed[i] = reason
            continue
        for view in range(len(crop_plan.plans)):
            own, first = view_keys(crop_plan, epoch, name, view)
            plan, size = crop_plan.plans[view], crop_plan.rows[view, SIZE]
            start, elements = start_of_view(crop_plan, images, at + i, view), 3 * size * size
            cropped = room[:elements].reshape(size, size, 3)
            box, flip = box_of(scratch.boxes, view)
            resize(image, box, flip, crop_plan.rows[view, INTERPOLATION], cropped, scratch.resizing)
            made = out[start : start + elements].reshape(3, size, size)
            augment(cropped, draw_all(own, first, plan), plan, made, planes)


@fast
def crop_by_patch(
    table: ImageTable,
    crop_plan: CropPlan,
    epoch: Integer,
    index: NDArray[np.int64],
    names: NDArray[np.int64],
    at: Integer,
    out: Floats,
    failed: Bytes,
) -> None:
    """As `crop_planar` of a single group of two views, the second of which is a jigsaw whose patches are coloured one
    by one."""
    size, plans, elements = crop_plan.rows[0, SIZE], crop_plan.plans, elements_of_views(crop_plan)
    planes, flat = np.empty(crop_plan.scratch, np.float32), np.empty(len(index) * elements, np.uint8)
    crop_bytes(table, crop_plan, epoch, index, names, 0, flat, failed)
    cropped = flat.reshape(len(index), 2, size, size, 3)
    for i in range(len(index)):
        if failed[i] == 0:
            made = out[(at + i) * elements : (at + i + 1) * elements].reshape(2, 3, size, size)
            first, second = view_keys(crop_plan, epoch, names[i], 0)[0], view_keys(crop_plan, epoch, names[i], 1)[0]
            augment(cropped[i, 0], draw_all(first, first, plans[0]), plans[0], made[0], planes)
            augment_patches(cropped[i, 1], second, plans[1], made[1], planes)
