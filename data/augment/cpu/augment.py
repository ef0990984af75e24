"""Augments a cropped view on a CPU: compiled loops over planes of float32, one image at a time.

In the order affine, jitter, photometric, grey, blur, solarize, normalise. Batched torch is ten times slower on a CPU;
on an accelerator torch_ops.py makes the same images.
"""

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.augment.cpu.affine import matrix, move
from kilobatch.data.augment.cpu.blur import blur, taps
from kilobatch.data.augment.cpu.colour import adjust, finish, grey, grey_sum, load_planes
from kilobatch.data.augment.cpu.pillow_ops import NEVER, photometric
from kilobatch.data.numba_jit import Bytes, Floats, Integer, Real, exact, fast
from kilobatch.data.views import columns
from kilobatch.data.views.columns import DO_CONTRAST, DO_HUE, ORDERS
from kilobatch.data.views.draws import draw_all
from kilobatch.data.views.options import Affine, Views

BAND = 2048  # pixels: three planes of a band (24 KiB) stay in the first-level cache from one operation to the next


def scratch_length(views: Views) -> Integer:
    """Length of the scratch array (float32) that `augment` needs, for any of the views."""
    radius = int(views.plans()[:, columns.RADIUS].max())
    return 2 * (views.size + 2 * radius) ** 2


@fast
def augment(image: Bytes, drawn: NDArray[np.float64], plan: Floats, out: Floats, scratch: Floats) -> None:
    """One view: image (H, W, 3) contiguous -> out (3, H, W) contiguous, normalised. drawn: as draw_all has it.

    H and W are the views' size in the plan's options; scratch has the `scratch_length` of those views, or more.
    """
    height, width, _ = image.shape
    planes = out.reshape(3, height * width)
    greyed, bytewise = drawn[columns.GREY] > 0, drawn[columns.PHOTOMETRIC] > 0
    grey_at_once = bool(greyed and not bytewise)
    if drawn[columns.AFFINE] > 0:
        move(image, matrix(drawn, height, width), plan[columns.FILL], planes)
        colour(image, False, grey_at_once, drawn, planes)
    else:
        colour(image, True, grey_at_once, drawn, planes)
    if bytewise:
        photometric(planes, height, width, drawn, scratch)
        if greyed:
            grey(planes[0], planes[1], planes[2])

    solarized = drawn[columns.SOLARIZE] > 0
    threshold = np.float32(drawn[columns.THRESHOLD]) if solarized else NEVER
    blurred = drawn[columns.BLUR] > 0
    weights = taps(drawn[columns.SIGMA], np.int64(plan[columns.RADIUS])) if blurred else scratch[:0]
    for channel in range(3):
        plane = planes[channel]
        if blurred:
            blur(plane, height, width, weights, plan[columns.BORDER], scratch)
        finish(plane, threshold, plan[columns.MEAN + channel], plan[columns.STD + channel])


@fast
def colour(image: Bytes, loading: bool, greyed: bool, drawn: NDArray[np.float64], planes: Floats) -> None:
    """Jitter and, if `greyed`, grey, in place on planes (3, pixels); `loading`: these are first filled from the image.

    Runs over the image in bands: once for the operations before contrast, which needs the mean of all pixels, and once
    for contrast and the rest.
    """
    pixels = planes.shape[1]
    source = image.reshape(3 * pixels)
    jittered = drawn[columns.JITTER] > 0
    order = ORDERS[np.int64(drawn[columns.ORDER])]
    factors = np.empty(4, np.float64)
    for operation in range(4):
        factors[operation] = drawn[columns.BRIGHTNESS + operation]
    before = 0
    while order[before] != DO_CONTRAST:
        before += 1

    total = 0.0
    for start in range(0, pixels, BAND):
        stop = min(start + BAND, pixels)
        r, g, b = planes[0, start:stop], planes[1, start:stop], planes[2, start:stop]
        if loading:
            load_planes(source[3 * start : 3 * stop], r, g, b)
        if jittered:
            for place in range(before):
                operation = int(order[place])
                if changes(operation, factors[operation]):
                    adjust(operation, factors[operation], 0.0, r, g, b)
            total += grey_sum(r, g, b)
    mean = total / pixels
    if jittered or greyed:
        for start in range(0, pixels, BAND):
            stop = min(start + BAND, pixels)
            r, g, b = planes[0, start:stop], planes[1, start:stop], planes[2, start:stop]
            if jittered:
                for place in range(before, 4):
                    operation = int(order[place])
                    if changes(operation, factors[operation]):
                        adjust(operation, factors[operation], mean, r, g, b)
            if greyed:
                grey(r, g, b)


@exact
def changes(operation: Integer, factor: Real) -> bool:
    """False for the factor that leaves the image as it is, which a strength of 0 draws."""
    return factor != (0 if operation == DO_HUE else 1)


def affine_batch(images: Bytes, keys: NDArray[np.uint64], affine: Affine) -> Bytes:
    """(N, H, W, 3) images and (N,) keys -> the moved images, as bytes; the same moves as views with these keys."""
    moved = np.empty_like(images)
    plan = Views(affine=affine).plan()
    move_all(np.ascontiguousarray(images), keys.view(np.uint64), plan, moved)
    return moved


@fast
def move_all(images: Bytes, keys: NDArray[np.uint64], plan: Floats, moved: Bytes) -> None:
    count, height, width, _ = images.shape
    planes = np.empty((3, height * width), np.float32)
    for i in range(count):
        drawn = draw_all(keys[i], keys[i], plan)
        if drawn[columns.AFFINE] > 0:
            move(images[i], matrix(drawn, height, width), plan[columns.FILL], planes)
            for channel in range(3):
                for at in range(height * width):
                    moved[i, at // width, at % width, channel] = np.uint8(np.rint(planes[channel, at]))
        else:
            moved[i] = images[i]
