"""The pixels that a filter weighs for each pixel of a resized line, and their weights: those of Pillow's filters.

They are bilinear or bicubic, and stretched by the ratio where a line is made shorter, which is antialiasing.
"""

import math

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.numba_jit import Integer, Real, exact
from kilobatch.data.views.columns import BICUBIC, BILINEAR
from kilobatch.data.views.pixel_vectors import FRACTION, LOW_BITS, WEIGHT_BITS

A = -0.5  # of the bicubic filter: Keys, 1981
ROUND = 4  # lines are filled up to a multiple of this, for loops that make four pixels at once


@exact
def count_pairs(length: Integer, size: Integer, interpolation: Integer) -> Integer:
    """Pairs of weights a pixel of a line of `length` pixels that is resized to `size`; no less for a longer line."""
    support = (2 if interpolation == BICUBIC else 1) * (length / size if length > size else 1.0)
    return (np.int64(math.ceil(2 * support)) + 1) // 2


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
    mixed: bool,
    flip: Integer,
) -> Integer:
    """For each pixel of a line the first pixel that it is made of, and the weights of those from there on.

    start: (size rounded up,). mixed: a pixel lies between two neighbours, as it does bilinearly where the line does not
    become shorter; then there is one weight for each, of the second, and the result is 0. Else it is the number of
    pairs, and weights are (size rounded up, pairs, 2, 2): of each pair the high parts and the low parts. Together they
    have the bits of Pillow's. flip: 1 for from the last pixel to the first; a
    constant of type bool would be a type of its own, and be compiled once more.
    """
    ratio = length / size
    stretch = ratio if length > size else 1.0
    support = (2 if interpolation == BICUBIC else 1) * stretch
    pairs = 0 if mixed else count_pairs(length, size, interpolation)
    row = np.empty(2 * pairs, np.float64)
    inverse = 1.0 / stretch
    for i in range(len(start)):
        pixel = size - 1 if i >= size else size - 1 - i if flip == 1 else i
        centre = (pixel + 0.5) * ratio
        if pairs == 0:
            left = centre - 0.5 if centre > 0.5 else 0.0
            first = np.int64(left)
            part = 0 if first >= length - 1 else np.int64((left - first) * (1 << FRACTION) + 0.5)
            start[i], weights[i] = min(first, length - 1), min(part, (1 << FRACTION) - 1)
            continue
        first = max(0, np.int64(centre - support + 0.5))
        count = min(2 * pairs, min(length, np.int64(centre + support + 0.5)) - first)
        start[i], total = first, 0.0
        for k in range(count):
            row[k] = weight_at((k + first - centre + 0.5) * inverse, interpolation)
            total += row[k]
        for k in range(count):
            share = row[k] / total * (1 << WEIGHT_BITS)
            weight = np.int64(share - 0.5 if share < 0 else share + 0.5)
            at, high = 2 * (2 * pairs * i + k - (k & 1)) + (k & 1), (weight + (1 << LOW_BITS - 1)) >> LOW_BITS
            weights[at], weights[at + 2] = high, weight - (high << LOW_BITS)
        for k in range(count, 2 * pairs):
            at = 2 * (2 * pairs * i + k - (k & 1)) + (k & 1)
            weights[at] = weights[at + 2] = 0
    return pairs
