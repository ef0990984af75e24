"""The pixels that a filter weighs for each pixel of a resized line, and their weights: those of Pillow's filters.

They are bilinear or bicubic, and stretched by the ratio where a line is made shorter, which is antialiasing. There are
three kinds of sums, and so of weights:

MIXED: a pixel lies between two neighbours, as it does bilinearly where no line becomes shorter. One weight, of the
second. WEIGHED: a few pixels, in numbers of 16 bits. EXACT: any number of them, in 32 bits, with Pillow's last bit.
"""

import math

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.numba_jit import Integer, Real, exact
from kilobatch.data.views.columns import BICUBIC, BILINEAR
from kilobatch.data.views.pixel_vectors import LOW_BITS, SHORT_BITS, WEIGHT_BITS
from kilobatch.data.views.vector_instructions import FRACTION

A = -0.5  # of the bicubic filter: Keys, 1981
ROUND = 4  # lines are filled up to a multiple of this, for loops that make four pixels at once
MIXED, WEIGHED, EXACT = 0, 1, 2
MOST_WEIGHED = 16  # pixels of a sum: each adds 1/43 at most to the error, and Pillow's own is up to a half


@exact
def count_taps(length: Integer, size: Integer, interpolation: Integer) -> Integer:
    """Weights a pixel of a line of `length` pixels that is resized to `size`; no less for a longer line."""
    support = (2 if interpolation == BICUBIC else 1) * (length / size if length > size else 1.0)
    return np.int64(math.ceil(2 * support))


@exact
def kind_of_sums(rows: Integer, columns: Integer, size: Integer, interpolation: Integer) -> Integer:
    """For a part of an image of this size that is resized to (size, size)."""
    longer = max(rows, columns)
    if interpolation == BILINEAR and longer <= size:
        return MIXED
    return WEIGHED if count_taps(longer, size, interpolation) <= MOST_WEIGHED else EXACT


@exact
def group_taps(taps: Integer, kind: Integer) -> Integer:
    """Weights of WEIGHED sums come in fours, those of EXACT ones in pairs."""
    return 0 if kind == MIXED else (taps + 3) // 4 if kind == WEIGHED else (taps + 1) // 2


@exact
def weight_at(x: Real, interpolation: Integer) -> Real:
    x = abs(x)
    if interpolation == BILINEAR:
        return 1.0 - x if x < 1 else 0.0
    if x < 1:
        return ((A + 2) * x - (A + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * A if x < 2 else 0.0


@exact
def fill_taps(
    start: NDArray[np.int64],
    weights: NDArray[np.int16],
    length: Integer,
    size: Integer,
    interpolation: Integer,
    kind: Integer,
    flip: Integer,
) -> Integer:
    """For each pixel of a line the first pixel that it is made of, and the weights of those from there on.

    start: (size rounded up,). weights: (size rounded up, groups, 4) int16, or one for each if MIXED; of EXACT sums,
    each pair has its high parts and then its low parts, which together have the bits of Pillow's. Returns the groups.
    flip: 1 for from the last pixel to the first; a constant of type bool would be a type of its own, and be compiled
    once more.
    """
    ratio = length / size
    stretch = ratio if length > size else 1.0
    support = (2 if interpolation == BICUBIC else 1) * stretch
    groups = group_taps(count_taps(length, size, interpolation), kind)
    most = groups * (4 if kind == WEIGHED else 2)
    row = np.empty(most, np.float64)
    inverse = 1.0 / stretch
    for i in range(len(start)):
        pixel = size - 1 if i >= size else size - 1 - i if flip == 1 else i
        centre = (pixel + 0.5) * ratio
        if kind == MIXED:
            left = centre - 0.5 if centre > 0.5 else 0.0
            first = np.int64(left)
            part = 0 if first >= length - 1 else np.int64((left - first) * (1 << FRACTION) + 0.5)
            start[i], weights[i] = min(first, length - 1), min(part, (1 << FRACTION) - 1)
            continue
        first = max(0, np.int64(centre - support + 0.5))
        count = min(most, min(length, np.int64(centre + support + 0.5)) - first)
        start[i], total, at = first, 0.0, 4 * groups * i
        for k in range(count):
            row[k] = weight_at((k + first - centre + 0.5) * inverse, interpolation)
            total += row[k]
        for k in range(4 * groups):
            weights[at + k] = 0
        for k in range(count):
            share = row[k] / total * (1 << (SHORT_BITS if kind == WEIGHED else WEIGHT_BITS))
            weight = np.int64(share - 0.5 if share < 0 else share + 0.5)
            if kind == WEIGHED:
                weights[at + k] = weight
                continue
            place, high = at + 2 * k - (k & 1), (weight + (1 << LOW_BITS - 1)) >> LOW_BITS
            weights[place], weights[place + 2] = high, weight - (high << LOW_BITS)
    return groups
