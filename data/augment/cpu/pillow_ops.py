"""Pillow's operations on bytes, on CPUs: posterize, sharpness, solarize, autocontrast and equalize, to the bit.

A channel is rounded to bytes, posterized and sharpened. All that follows turns a level into another, whatever its place
in the image; so it is one table of 256 levels, made from the counts of the levels alone.
"""

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.numba_jit import Bytes, Floats, Integer, Real, exact, fast
from kilobatch.data.views import columns

LEVELS = 256
NEVER = np.float32(256)  # a solarize threshold that no pixel reaches
ZERO, HALF, FOUR, FULL = (np.float32(x) for x in (0, 0.5, 4, 255))
THIRTEENTH = np.float32(1 / 13)
Counts = NDArray[np.int64]


@fast
def photometric(planes: Floats, height: Integer, width: Integer, drawn: NDArray[np.float64], scratch: Floats) -> None:
    """Planes (3, height * width) in 0..255, in place; then they hold whole numbers. drawn: as draw_all has it;
    scratch: as long as a plane."""
    pixels = height * width
    room = scratch.view(np.uint8)
    rounded, sharpened = room[:pixels], room[pixels : 2 * pixels]
    bits = np.int64(drawn[columns.BITS]) if drawn[columns.POSTERIZE] > 0 else 8
    sharpening, factor = drawn[columns.SHARPEN] > 0, np.float32(drawn[columns.SHARPNESS])
    threshold = np.float32(drawn[columns.EARLY_THRESHOLD]) if drawn[columns.SOLARIZE_EARLY] > 0 else NEVER
    stretching, equalizing = drawn[columns.AUTOCONTRAST] > 0, drawn[columns.EQUALIZE] > 0
    table, counts = np.empty(LEVELS, np.int64), np.empty(LEVELS, np.int64)
    for channel in range(3):
        to_bytes(planes[channel], np.uint8(256 - (1 << (8 - bits))), rounded)
        if sharpening:
            sharpen(rounded, height, width, factor, sharpened)
        levels = sharpened if sharpening else rounded
        if stretching or equalizing:
            count_levels(levels, counts)
        for level in range(LEVELS):
            table[level] = LEVELS - 1 - level if level >= threshold else level
        if stretching:
            autocontrast(counts, table)
        if equalizing:
            equalize(counts, table)
        look_up(levels, table, planes[channel])


@fast
def to_bytes(plane: Floats, kept: Integer, levels: Bytes) -> None:
    """Rounds, and keeps the bits that `kept` has."""
    for x in range(len(plane)):
        levels[x] = np.uint8(np.int32(np.rint(plane[x]))) & kept


@exact
def sharpen(levels: Bytes, height: Integer, width: Integer, factor: Real, sharpened: Bytes) -> None:
    """ImageEnhance.Sharpness: 0 for the mean of 3x3 pixels, of which the middle one counts fivefold, 1 for the image.

    The outermost pixels stay as they are. float32, and digits after the point cut off, as in Pillow.
    """
    column = np.empty(width, np.float32)  # sums of three pixels, one above the other
    for y in range(height):
        row, out = levels[y * width : (y + 1) * width], sharpened[y * width : (y + 1) * width]
        if y == 0 or y == height - 1:
            for x in range(width):
                out[x] = row[x]
            continue
        above, below = levels[(y - 1) * width : y * width], levels[(y + 1) * width : (y + 2) * width]
        out[0], out[width - 1] = row[0], row[width - 1]
        for x in range(width):
            column[x] = np.float32(above[x]) + np.float32(row[x]) + np.float32(below[x])
        for x in range(1, width - 1):
            own = np.float32(row[x])
            total = column[x - 1] + column[x] + column[x + 1] + FOUR * own
            smooth = np.float32(np.int32(total * THIRTEENTH + HALF))  # a sum of whole numbers is never half-way
            mixed = smooth + factor * (own - smooth)
            out[x] = np.uint8(np.int32(min(max(mixed, ZERO), FULL)))


@exact
def count_levels(levels: Bytes, counts: Counts) -> None:
    """counts (256,): how many of these bytes have each level."""
    for level in range(LEVELS):
        counts[level] = 0
    for x in range(len(levels)):
        counts[levels[x]] += 1


@exact
def autocontrast(counts: Counts, table: Counts) -> None:
    """ImageOps.autocontrast: stretches the levels that occur to 0..255; in float64, digits after the point cut off."""
    low, high = LEVELS - 1, 0
    for level in range(LEVELS):
        if counts[level] > 0:
            low, high = min(low, table[level]), max(high, table[level])
    if high <= low:
        return
    scale = 255.0 / (high - low)
    offset = -low * scale
    for level in range(LEVELS):
        table[level] = min(max(np.int64(table[level] * scale + offset), 0), LEVELS - 1)


@exact
def equalize(counts: Counts, table: Counts) -> None:
    """ImageOps.equalize: each level becomes the share of pixels below it."""
    below, last, total = np.zeros(LEVELS, np.int64), np.int64(0), np.int64(0)  # first: how many have each level
    for level in range(LEVELS):
        below[table[level]] += counts[level]
        total += counts[level]
    for level in range(LEVELS):
        last = below[level] if below[level] > 0 else last
    step = (total - last) // 255
    if step == 0:
        return
    sum_ = step // 2
    for level in range(LEVELS):
        own = below[level]
        below[level] = min(sum_ // step, LEVELS - 1)
        sum_ += own
    for level in range(LEVELS):
        table[level] = below[table[level]]


@fast
def look_up(levels: Bytes, table: Counts, plane: Floats) -> None:
    for x in range(len(plane)):
        plane[x] = np.float32(table[levels[x]])
