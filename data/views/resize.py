"""Resizes a part of an image as Pillow does, bilinearly or bicubically.

Lines are resized first, and rows of the result are then made of them. Both are sums of weighted pixels, with Pillow's
bits, unless a bilinear part is shrunk in neither direction: then a pixel lies between two neighbours each time, which
takes a quarter of the time and is at most 1 of 255 apart. Only pixels of the part count.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.numba_jit import Bytes, Integer, exact
from kilobatch.data.views.byte_vectors import BYTES, copy_bytes, load_word
from kilobatch.data.views.columns import BILINEAR
from kilobatch.data.views.filter_taps import ROUND, count_pairs, fill_taps
from kilobatch.data.views.pixel_vectors import (
    NOTHING,
    WINDOW,
    filter_four_rows,
    filter_pixels,
    filter_pixels_by_four,
    filter_rows,
    mix_pixels,
    mix_rows,
)

HALF = BYTES // 2  # bytes that `mix_pixels` makes from one window
LEAST_SIZE = 6  # pixels of a resized row: BYTES are stored at a time

Box = tuple[Integer, Integer, Integer, Integer]  # top, left, rows, columns


class ResizeScratch(NamedTuple):
    """Arrays that `resize` works in and divides among its parts; few, since compiling a call takes time for each."""

    bytes: Bytes
    weights: NDArray[np.int16]
    places: NDArray[np.int64]


class LinePlan(NamedTuple):
    """How lines are resized; the last three are addresses."""

    pairs: Integer  # of taps; 0: each pixel lies between two
    chunks: Integer  # calls that make a line
    starts: Integer
    weights: Integer
    picks: Integer


@exact
def address(array: NDArray[np.generic]) -> Integer:
    """A signed number: numba adds an unsigned and a signed one as floats."""
    return np.int64(array.ctypes.data)


@exact
def make_scratch(height: Integer, width: Integer, size: Integer, interpolation: Integer) -> ResizeScratch:
    """For parts of images of up to (height, width), resized to (size, size)."""
    across, down = count_pairs(width, size, interpolation), count_pairs(height, size, interpolation)
    filled, halves = (size + ROUND - 1) // ROUND * ROUND, (3 * size + BYTES - 1) // BYTES * 2
    line, resized = 3 * (width + 2 * across) + WINDOW, 6 * filled + 4 * BYTES
    return ResizeScratch(
        np.empty(line + BYTES * halves + 2 * max(1, down) * resized + BYTES * (height + 1), np.uint8),
        np.empty(4 * (across + down) * filled + halves * HALF, np.int16),
        np.empty(2 * filled + halves + 2 * max(1, down), np.int64),
    )


@exact
def plan_mixed_line(
    size: Integer,
    start: NDArray[np.int64],
    mixture: NDArray[np.int16],
    windows: NDArray[np.int64],
    picks: Bytes,
    weights: NDArray[np.int16],
) -> None:
    """Fills in what `mix_pixels` reads: windows (halves,), picks (halves * BYTES,), weights (halves * HALF,)."""
    for half in range(len(windows)):
        begin, end = min(size - 1, HALF * half // 3), min(size - 1, (HALF * half + HALF - 1) // 3)
        window = 3 * min(start[begin], start[end])
        windows[half] = window
        for i in range(HALF * half, HALF * (half + 1)):
            pixel = min(size - 1, i // 3)
            picks[2 * i], picks[2 * i + 1] = 3 * start[pixel] + i % 3 - window, NOTHING
            weights[i] = mixture[pixel]


@exact
def resize_line(source: Integer, plan: LinePlan, to: Integer) -> None:
    """Resizes the line at address `source` to address `to`, where there must be room for BYTES more."""
    starts, weights = plan.starts, plan.weights
    for chunk in range(plan.chunks):
        if plan.pairs == 0:
            mix_pixels(
                to + 2 * BYTES * chunk, source, starts + 16 * chunk, plan.picks + 32 * chunk, weights + 32 * chunk
            )
        elif plan.pairs == 2:
            filter_pixels_by_four(to + 12 * chunk, source, starts + 32 * chunk, weights + 64 * chunk)
        else:
            taps = weights + 32 * plan.pairs * chunk
            filter_pixels(to + 12 * chunk, source, starts + 32 * chunk, taps, plan.pairs)


@exact
def make_row(to: Integer, length: Integer, lines: NDArray[np.int64], weights: Integer, pairs: Integer) -> None:
    """Makes a row of the lines at these addresses: `length` bytes, and no less than BYTES, to address `to`.

    lines: (2 * pairs,), or two of which the row is a mixture; weights: the address of the row's.
    """
    first, second, word, chunks = lines[0], lines[1], load_word(weights), (length + BYTES - 1) // BYTES
    third, fourth, more = (lines[2], lines[3], load_word(weights + 8)) if pairs == 2 else (first, second, word)
    weight, addresses = np.int16(word & 0xFFFF), address(lines)
    for chunk in range(chunks):
        at = min(BYTES * chunk, length - BYTES) if chunk > 0 else 0
        if pairs == 0:
            mix_rows(to + at, first + 2 * at, second + 2 * at, weight)
        elif pairs == 2:
            filter_four_rows(to + at, first + at, second + at, third + at, fourth + at, word, more)
        else:
            filter_rows(to + at, addresses, at, weights, pairs)


@exact
def resize(image: Bytes, box: Box, flip: bool, interpolation: Integer, out: Bytes, scratch: ResizeScratch) -> None:
    """image (H, W, 3), its part `box` -> out (size, size, 3), flipped from left to right if asked.

    Both arrays are contiguous. The size is at least LEAST_SIZE, and the scratch made for it and for this image.
    """
    top, left, rows, columns = box
    size, step, end = out.shape[0], 3 * image.shape[1], address(image) + image.size
    source, to = address(image) + top * step + 3 * left, address(out)
    filled, halves = (size + ROUND - 1) // ROUND * ROUND, (3 * size + BYTES - 1) // BYTES * 2

    places, windows = scratch.places, scratch.places[2 * filled : 2 * filled + halves]
    across, start, lines = places[:filled], places[filled : 2 * filled], places[2 * filled + halves :]
    weights_across, mixed = scratch.weights, interpolation == BILINEAR and rows <= size and columns <= size
    pairs = fill_taps(across, weights_across, columns, size, interpolation, mixed, 1 if flip else 0)
    down = weights_across[max(1, 4 * pairs) * filled :]
    row_pairs = fill_taps(start, down, rows, size, interpolation, mixed, 0)
    per_row, count, taps = max(1, 4 * row_pairs), max(2, 2 * row_pairs), address(down)
    if pairs == 0:
        weights, picks = down[per_row * filled :], scratch.bytes
        plan_mixed_line(size, across, weights_across, windows, picks, weights)
        plan = LinePlan(0, halves // 2, address(windows), address(weights), address(picks))
    else:
        for i in range(filled):
            across[i] *= 3  # bytes
        plan = LinePlan(pairs, filled // ROUND, address(across), address(weights_across), np.int64(0))
    resized, stride = address(scratch.bytes) + BYTES * halves, 6 * filled + 4 * BYTES
    line, reach = resized + count * stride, 3 * columns + 6 * pairs + WINDOW

    # Bicubic sums are cut to [0, 255] on the way, so the order matters. This is Pillow's rule since version 13; before,
    # lines always came first.
    if rows > size and rows - size > 2 * (columns - size):
        if 3 * columns < BYTES:  # what lies after the image may not be readable
            for row in range(rows):
                copy_bytes(line + reach + 3 * columns * row, source + row * step, 3 * columns)
            source, step = line + reach, 3 * columns
        for y in range(size):
            for k in range(count):
                lines[k] = source + min(start[y] + k, rows - 1) * step
            make_row(line, 3 * columns, lines, taps + 2 * per_row * y, row_pairs)
            resize_line(line, plan, resized)
            copy_bytes(to + 3 * size * y, resized, 3 * size)
        return
    for k in range(count):
        lines[k] = resized + k * stride
    first, made = np.int64(0), np.int64(0)  # lines[k] is for row first + k; rows below `made` have been resized
    for y in range(size):
        while first < start[y]:
            unused = lines[0]
            for k in range(count - 1):
                lines[k] = lines[k + 1]
            lines[count - 1] = unused
            first += 1
        for row in range(max(first, made), min(rows, first + count)):
            of_row = source + row * step
            if of_row + reach > end:  # what lies after the image may not be readable
                copy_bytes(line, of_row, 3 * columns)
                of_row = line
            resize_line(of_row, plan, lines[row - first])
        made = max(made, min(rows, first + count))
        make_row(to + 3 * size * y, 3 * size, lines, taps + 2 * per_row * y, row_pairs)
