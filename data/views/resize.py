"""Resizes a part of an image by Pillow's filters, bilinear or bicubic, at most 1 of 255 apart from Pillow.

As there, lines are resized first, and their bytes then mixed or weighed to make the result's rows. A bilinear pixel of
a line that does not become shorter lies between two pixels, which needs no sums. Only the part's own pixels count.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.numba_jit import Bytes, Integer, exact
from kilobatch.data.views.byte_vectors import (
    BYTES,
    NOTHING,
    WINDOW,
    filter_pixels,
    filter_rows,
    mix_pixels,
    mix_rows,
)
from kilobatch.data.views.filter_taps import (
    BILINEAR,
    ROUND,
    Taps,
    count_taps,
    fill_mixture,
    fill_taps,
    make_taps,
)

HALF = BYTES // 2  # bytes that `mix_pixels` makes from one window
LEAST_SIZE = 6  # pixels of a resized row: their bytes are stored BYTES at a time


class ResizeScratch(NamedTuple):
    """Arrays that `resize` works in."""

    across: Taps
    down: Taps
    lines: Bytes  # (most taps, bytes of a resized line and more): the last resized lines, in turn
    addresses: NDArray[np.int64]  # (most taps,) of the lines that make a row
    line: Bytes  # a line of the image, with room after it
    narrow: Bytes  # a part of the image with few columns, with room after it
    windows: NDArray[np.int64]  # (halves,) where the windows of `mix_pixels` begin in a line, in bytes
    picks: Bytes  # (halves, HALF, 2)
    weights: NDArray[np.int16]  # (halves, HALF)


@exact
def address(array: np.ndarray) -> Integer:
    """Signed, since numba adds unsigned to signed numbers as floats."""
    return np.int64(array.ctypes.data)


@exact
def make_scratch(height: Integer, width: Integer, size: Integer, interpolation: Integer) -> ResizeScratch:
    """For parts of images of up to (height, width), resized to (size, size)."""
    columns, rows = count_taps(width, size, interpolation), count_taps(height, size, interpolation)
    halves = (3 * size + BYTES - 1) // BYTES * 2
    return ResizeScratch(
        make_taps(width, size, interpolation),
        make_taps(height, size, interpolation),
        np.empty((rows, halves * HALF + 3 * ROUND + BYTES), np.uint8),
        np.empty(rows, np.int64),
        np.empty(3 * (width + columns) + WINDOW, np.uint8),
        np.empty(3 * LEAST_SIZE * height + BYTES, np.uint8),
        np.empty(halves, np.int64),
        np.empty((halves, HALF, 2), np.uint8),
        np.empty((halves, HALF), np.int16),
    )


class LinePlan(NamedTuple):
    """How lines are resized; the last three are addresses."""

    mixed: bool
    reach: Integer  # bytes from a line's first one that may be read
    pairs: Integer
    chunks: Integer
    starts: Integer
    weights: Integer
    picks: Integer


@exact
def prepare(taps: Taps, length: Integer, size: Integer, interpolation: Integer) -> tuple[bool, Integer]:
    """Fills in the taps; returns whether they are mixtures of two pixels, and how many there are."""
    if interpolation == BILINEAR and length <= size:
        fill_mixture(taps, length, size)
        return True, 2
    fill_taps(taps, length, size, interpolation)
    return False, count_taps(length, size, interpolation)


@exact
def prepare_line(
    columns: Integer, size: Integer, flip: bool, interpolation: Integer, scratch: ResizeScratch
) -> LinePlan:
    """Plans lines of so many columns; with `flip` from the last pixel to the first."""
    taps = scratch.across
    mixed, count = prepare(taps, columns, size, interpolation)
    if flip:
        per_pixel = 1 if mixed else 2 * count
        for i in range(size // 2):
            j = size - 1 - i
            taps.start[i], taps.start[j] = taps.start[j], taps.start[i]
            for k in range(per_pixel):
                a, b = per_pixel * i + k, per_pixel * j + k
                taps.weights[a], taps.weights[b] = taps.weights[b], taps.weights[a]
    for i in range(len(taps.start)):
        taps.start[i] *= 3
    if not mixed:
        return LinePlan(False, 3 * columns + 3 * count + 2, count // 2, (size + 3) // 4, address(taps.start), address(taps.weights), np.int64(0))
    last = 3 * size - 1
    for half in range(len(scratch.windows)):
        begin, end = min(last, HALF * half) // 3, min(last, HALF * half + HALF - 1) // 3
        window = min(taps.start[begin], taps.start[end])
        scratch.windows[half] = window
        for i in range(HALF):
            byte = min(last, HALF * half + i)
            scratch.picks[half, i, 0] = taps.start[byte // 3] + byte % 3 - window
            scratch.picks[half, i, 1] = NOTHING
            scratch.weights[half, i] = taps.weights[byte // 3]
    return LinePlan(True, 3 * columns + WINDOW, 1, len(scratch.windows) // 2, address(scratch.windows), address(scratch.weights), address(scratch.picks))


@exact
def resize_line(source: Integer, plan: LinePlan, to: Integer) -> None:
    """Resizes the line at address `source` to address `to`, where there must be room for BYTES more."""
    starts, weights = plan.starts, plan.weights
    if plan.mixed:
        for chunk in range(plan.chunks):
            mix_pixels(to + BYTES * chunk, source, starts + 16 * chunk, plan.picks + 32 * chunk, weights + 32 * chunk)
    else:
        for chunk in range(plan.chunks):
            taps = weights + 32 * plan.pairs * chunk
            filter_pixels(to + 12 * chunk, source, starts + 32 * chunk, taps, plan.pairs)


@exact
def make_row(to: Integer, length: Integer, first: Integer, second: Integer, mixture: Integer, addresses: Integer, weights: Integer, pairs: Integer) -> None:
    """Makes a row of `length` bytes, at least BYTES: a mixture of two lines, or with pairs > 0 their weighted sums."""
    for chunk in range((length + BYTES - 1) // BYTES):
        at = max(0, min(BYTES * chunk, length - BYTES))
        if pairs == 0:
            mix_rows(to + at, first + at, second + at, mixture)
        else:
            filter_rows(to + at, addresses, at, weights, pairs)


@exact
def resize(
    image: Bytes,
    box: tuple[Integer, Integer, Integer, Integer],
    flip: bool,
    interpolation: Integer,
    out: Bytes,
    scratch: ResizeScratch,
) -> None:
    """image (H, W, 3), its part `box` (top, left, rows, columns) -> out (size, size, 3), flipped horizontally if asked.

    Both arrays are contiguous. The size is at least LEAST_SIZE, and the scratch made for it and for this image.
    """
    top, left, rows, columns = box
    size, width = out.shape[0], image.shape[1]
    pixels, start, end = image.reshape(image.size), address(image), address(image) + image.size
    plan = prepare_line(columns, size, flip, interpolation, scratch)
    mixed, count = prepare(scratch.down, rows, size, interpolation)
    pairs = 0 if mixed else count // 2
    first_tap, weights = scratch.down.start, scratch.down.weights
    lines, addresses = address(scratch.lines), scratch.addresses
    stride, line = scratch.lines.shape[1], scratch.line
    # The order decides what bicubic sums lose where they are cut to [0, 255]. This is Pillow's rule from version 13 on;
    # earlier ones always begin with lines.
    if rows > size and rows - size > 2 * (columns - size):
        source, step = start + 3 * (top * width + left), 3 * width
        if 3 * columns < BYTES:  # what lies after the image may not be readable
            for row in range(rows):
                at = 3 * ((top + row) * width + left)
                scratch.narrow[3 * columns * row : 3 * columns * (row + 1)] = pixels[at : at + 3 * columns]
            source, step = address(scratch.narrow), 3 * columns
        flat, resized = out.reshape(out.size), scratch.lines.reshape(scratch.lines.size)
        for y in range(size):
            for k in range(count):
                addresses[k] = source + min(first_tap[y] + k, rows - 1) * step
            make_row(address(line), 3 * columns, addresses[0], addresses[1], np.int16(0), address(addresses), address(weights) + 4 * count * y, pairs)
            resize_line(address(line), plan, lines)
            flat[3 * size * y : 3 * size * (y + 1)] = resized[: 3 * size]
        return
    done = np.int64(0)
    for y in range(size):
        last = min(rows, first_tap[y] + count)
        for row in range(max(done, first_tap[y]), last):
            at = 3 * ((top + row) * width + left)
            source = start + at
            if source + plan.reach > end:  # what lies after the image may not be readable
                line[: 3 * columns] = pixels[at : at + 3 * columns]
                source = address(line)
            resize_line(source, plan, lines + row % count * stride)
        done = last
        for k in range(count):
            addresses[k] = lines + (first_tap[y] + k) % count * stride
        make_row(address(out) + 3 * size * y, 3 * size, addresses[0], addresses[1], weights[y], address(addresses), address(weights) + 4 * count * y, pairs)
