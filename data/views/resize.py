"""Resizes a part of an image as Pillow does, bilinearly or bicubically: at most 1 of 255 apart.

Lines are resized first, and rows of the result are then made of them. Between the two there are more bits than Pillow
keeps; only where a part is shrunk to an eighth and less, bicubically to a quarter, are sums Pillow's to the bit. Only
pixels of the part count.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.numba_jit import Bytes, Integer, exact
from kilobatch.data.views.byte_vectors import BYTES, copy_bytes, load_short
from kilobatch.data.views.columns import BICUBIC
from kilobatch.data.views.filter_taps import (
    EXACT,
    MIXED,
    MOST_WEIGHED,
    ROUND,
    WEIGHED,
    count_taps,
    fill_taps,
    kind_of_sums,
)
from kilobatch.data.views.pixel_vectors import (
    SHORT_BITS,
    WIDE,
    WINDOW,
    filter_pixels,
    filter_rows,
    mix_pixels,
    mix_rows,
    weigh_pixels,
    weigh_rows,
)
from kilobatch.data.views.vector_instructions import NOTHING

HALF = BYTES // 2  # bytes that `mix_pixels` makes from one window
LEAST_SIZE = 6  # pixels of a resized row: BYTES are stored at a time
SPREAD = 16  # weights that `weigh_pixels` reads for four of them

Box = tuple[Integer, Integer, Integer, Integer]  # top, left, rows, columns


class ResizeScratch(NamedTuple):
    """Arrays that `resize` works in and divides among its parts; few, since compiling a call takes time for each."""

    bytes: Bytes
    weights: NDArray[np.int16]
    places: NDArray[np.int64]


class LinePlan(NamedTuple):
    """How lines are resized; the last three are addresses."""

    kind: Integer  # of sums
    groups: Integer  # of weights
    chunks: Integer  # calls that make a line
    starts: Integer
    weights: Integer
    picks: Integer


class RowPlan(NamedTuple):
    """How rows are made of lines."""

    kind: Integer
    taps: Integer  # lines that a row is made of
    step: Integer  # weights a row
    weights: Integer  # their address


@exact
def address(array: NDArray[np.generic]) -> Integer:
    """A signed number: numba adds an unsigned and a signed one as floats."""
    return np.int64(array.ctypes.data)


@exact
def line_sizes(size: Integer) -> tuple[Integer, Integer]:
    """Pixels of a resized line, filled up to ROUND, and the halves that `mix_pixels` makes it of."""
    return (size + ROUND - 1) // ROUND * ROUND, (3 * size + BYTES - 1) // BYTES * 2


@exact
def make_scratch(height: Integer, width: Integer, size: Integer, interpolation: Integer) -> ResizeScratch:
    """For parts of images of up to (height, width), resized to (size, size)."""
    return allocate(scratch_sizes(height, width, size, interpolation))


@exact
def allocate(sizes: tuple[Integer, Integer, Integer]) -> ResizeScratch:
    return ResizeScratch(np.empty(sizes[0], np.uint8), np.empty(sizes[1], np.int16), np.empty(sizes[2], np.int64))


@exact
def scratch_sizes(
    height: Integer, width: Integer, size: Integer, interpolation: Integer
) -> tuple[Integer, Integer, Integer]:
    """The lengths of the scratch's arrays, of which longer ones do as well."""
    across, down = count_taps(width, size, interpolation) + 1, count_taps(height, size, interpolation) + 1
    filled, halves = line_sizes(size)
    line, resized = 3 * (width + across + MOST_WEIGHED) + WIDE, 6 * filled + 2 * WIDE
    spread = max(halves * HALF, SPREAD * ((min(across, MOST_WEIGHED) + 3) // 4) * filled)
    return (
        line + BYTES * halves + (down + 1) * resized + BYTES * (height + 1),
        2 * (across + down + 4) * filled + spread + 1,
        2 * filled + halves + down + 1,
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
def spread_weights(weights: NDArray[np.int16], fours: Integer, pixels: Integer, spread: NDArray[np.int16]) -> None:
    """Fills in what `weigh_pixels` reads of the weights (pixels, fours, 4)."""
    for i in range(pixels):
        for k in range(4 * fours):
            four, pair = k // 4, k % 4 // 2
            at = SPREAD * (4 * (i // 4 * fours + four) + i % 4 // 2 * 2 + pair) + i % 2 * (SPREAD // 2) + k % 2
            weight = weights[4 * fours * i + k]
            spread[at] = spread[at + 2] = spread[at + 4] = spread[at + 6] = weight


@exact
def plan_lines(
    columns: Integer, size: Integer, interpolation: Integer, kind: Integer, flip: bool, scratch: ResizeScratch
) -> tuple[LinePlan, Integer]:
    """The plan, and how many of the scratch's weights it uses."""
    filled, halves = line_sizes(size)
    starts, windows = scratch.places[:filled], scratch.places[filled : filled + halves]
    groups = fill_taps(starts, scratch.weights, columns, size, interpolation, kind, 1 if flip else 0)
    used, own = max(1, 4 * groups) * filled, address(scratch.weights)
    more, picks = scratch.weights[used:], scratch.bytes
    if kind == MIXED:
        plan_mixed_line(size, starts, scratch.weights, windows, picks, more)
        plan = LinePlan(kind, groups, halves // 2, address(windows), address(more), address(picks))
        return plan, used + halves * HALF
    for i in range(filled):
        starts[i] *= 3  # bytes
    if kind == EXACT:
        return LinePlan(kind, groups, filled // ROUND, address(starts), own, np.int64(0)), used
    spread_weights(scratch.weights, groups, filled, more)
    plan = LinePlan(kind, groups, filled // ROUND, address(starts), address(more), np.int64(0))
    return plan, used + SPREAD * groups * filled


@exact
def resize_line(source: Integer, plan: LinePlan, to: Integer) -> None:
    """Resizes the line at address `source` to address `to`, where there must be room for WIDE bytes more.

    EXACT sums make bytes, others numbers of 16 bits.
    """
    starts, weights = plan.starts, plan.weights
    for chunk in range(plan.chunks):
        if plan.kind == MIXED:
            mix_pixels(
                to + 2 * BYTES * chunk, source, starts + 16 * chunk, plan.picks + 32 * chunk, weights + 32 * chunk
            )
        elif plan.kind == WEIGHED:
            taps = weights + 8 * SPREAD * plan.groups * chunk
            weigh_pixels(to + 24 * chunk, source, starts + 32 * chunk, taps, plan.groups)
        else:
            taps = weights + 32 * plan.groups * chunk
            filter_pixels(to + 12 * chunk, source, starts + 32 * chunk, taps, plan.groups)


@exact
def make_row(to: Integer, length: Integer, lines: NDArray[np.int64], y: Integer, plan: RowPlan) -> None:
    """Makes row y of the lines at these addresses (plan.taps,): `length` bytes to address `to`.

    There must be room for WIDE bytes, or BYTES if the sums are EXACT.
    """
    weights = plan.weights + 2 * plan.step * y
    if plan.kind == EXACT:
        for chunk in range((length + BYTES - 1) // BYTES):
            at = min(BYTES * chunk, length - BYTES) if chunk > 0 else 0
            filter_rows(to + at, address(lines), at, weights, plan.step // 4)
        return
    weight = load_short(weights)
    for chunk in range((length + WIDE - 1) // WIDE):
        at = min(WIDE * chunk, length - WIDE) if chunk > 0 else 0
        if plan.kind == MIXED:
            mix_rows(to + at, lines[0] + 2 * at, lines[1] + 2 * at, weight)
        else:
            weigh_rows(to + at, address(lines), 2 * at, weights, plan.taps)


@exact
def resize(image: Bytes, box: Box, flip: bool, interpolation: Integer, out: Bytes, scratch: ResizeScratch) -> None:
    """image (H, W, 3), its part `box` -> out (size, size, 3), flipped from left to right if asked.

    Both arrays are contiguous. The size is at least LEAST_SIZE, and the scratch made for it and for this image.
    """
    top, left, rows, columns = box
    size, step, end = out.shape[0], 3 * image.shape[1], address(image) + image.size
    source, to, length = address(image) + top * step + 3 * left, address(out), 3 * out.shape[0]
    filled, halves = line_sizes(size)
    kind = kind_of_sums(rows, columns, size, interpolation)
    plan, used = plan_lines(columns, size, interpolation, kind, flip, scratch)
    start, down = scratch.places[filled + halves : 2 * filled + halves], scratch.weights[used:]
    # Bicubic sums are cut to [0, 255] on the way, so the order matters. This is Pillow's rule since version 13; before,
    # lines always came first.
    rows_first = rows > size and rows - size > 2 * (columns - size) and (kind == EXACT or interpolation == BICUBIC)
    kind = EXACT if rows_first else kind
    groups, taps = fill_taps(start, down, rows, size, interpolation, kind, 0), count_taps(rows, size, interpolation)
    count = 2 if kind == MIXED else taps if kind == WEIGHED else 2 * groups
    row_plan = RowPlan(kind, count, max(1, 4 * groups), address(down))
    lines, stride = scratch.places[2 * filled + halves :], 6 * filled + 2 * WIDE
    for k in range(count):
        lines[k] = address(scratch.bytes) + BYTES * halves + k * stride
    line, reach = lines[0] + count * stride, 3 * (columns + max(MOST_WEIGHED, 2 * plan.groups)) + WINDOW
    if rows_first:
        if 3 * columns < BYTES:  # what lies after the image may not be readable
            for row in range(rows):
                copy_bytes(line + reach + 3 * columns * row, source + row * step, 3 * columns)
            source, step = line + reach, 3 * columns
        scratch.weights[-1] = 1 << SHORT_BITS
        buffers = line, lines[0], lines[1], address(scratch.weights[-1:])
        resize_rows_first((source, step, rows, columns), plan, start, row_plan, lines, buffers, out)
        return
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
        if length >= WIDE:
            make_row(to + length * y, length, lines, y, row_plan)
        else:
            make_row(line, length, lines, y, row_plan)
            copy_bytes(to + length * y, line, length)


@exact
def resize_rows_first(
    part: tuple[Integer, Integer, Integer, Integer],
    plan: LinePlan,
    start: NDArray[np.int64],
    row_plan: RowPlan,
    lines: NDArray[np.int64],
    buffers: tuple[Integer, Integer, Integer, Integer],
    out: Bytes,
) -> None:
    """part: the address of its first pixel, bytes from a row to the next, rows, columns; buffers: for a row of the
    part, for two resized ones, and the weight 1."""
    source, step, rows, columns = part
    line, resized, whole, one = buffers
    length = 3 * out.shape[1]
    for y in range(out.shape[0]):
        for k in range(row_plan.taps):
            lines[k] = source + min(start[y] + k, rows - 1) * step
        make_row(line, 3 * columns, lines, y, row_plan)
        resize_line(line, plan, resized)
        if plan.kind == WEIGHED:
            lines[0] = resized
            make_row(whole, length, lines, 0, RowPlan(WEIGHED, np.int64(1), np.int64(4), one))
        copy_bytes(address(out) + length * y, whole if plan.kind == WEIGHED else resized, length)
