"""The pixels that a filter weighs for each pixel of a resized line, and their weights: those of Pillow's filters.

Both filters are bilinear (support 1) or bicubic (support 2, a = -0.5); where a line is made shorter they are stretched
by the ratio, which is antialiasing.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.numba_jit import Integer, Real, exact
from kilobatch.data.views.byte_vectors import FRACTION, LOW_BITS, WEIGHT_BITS

BILINEAR, BICUBIC = 0, 1
A = -0.5  # of the bicubic filter; Keys, 1981
ROUND = 4  # lines are filled up to a multiple of this, for loops that make four pixels at once


class Taps(NamedTuple):
    """For each pixel of a line, the first pixel that it is made of, and the weights of those from there on.

    The weights are those of `byte_vectors`: one a pixel for a mixture of two pixels, else for each pair of pixels the
    two high parts and the two low parts.
    """

    start: NDArray[np.int64]  # (size rounded up,)
    weights: NDArray[np.int16]  # (size rounded up * 2 * count,)


@exact
def count_taps(length: Integer, size: Integer, interpolation: Integer) -> Integer:
    """Weights a pixel, an even number, of a line of `length` pixels that is resized to `size`; no less for more."""
    support = (2 if interpolation == BICUBIC else 1) * max(length / size, 1.0)
    return (np.int64(math.ceil(2 * support)) + 1) // 2 * 2


@exact
def make_taps(length: Integer, size: Integer, interpolation: Integer) -> Taps:
    """Room for lines of up to `length` pixels."""
    filled = (size + ROUND - 1) // ROUND * ROUND
    return Taps(np.empty(filled, np.int64), np.empty(filled * 2 * count_taps(length, size, interpolation), np.int16))


@exact
def weight_at(x: Real, interpolation: Integer) -> Real:
    x = abs(x)
    if interpolation == BILINEAR:
        return max(0.0, 1.0 - x)
    if x < 1:
        return ((A + 2) * x - (A + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * A if x < 2 else 0.0


@exact
def fill_mixture(taps: Taps, length: Integer, size: Integer) -> None:
    """Fills in, of the bilinear filter where a line does not become shorter, the first of two pixels, and the second's
    weight, one a pixel."""
    for i in range(len(taps.start)):
        centre = max(0.0, (min(i, size - 1) + 0.5) * length / size - 0.5)
        start = min(np.int64(centre), length - 1)
        taps.start[i] = start
        fraction = centre - start if start < length - 1 else 0.0
        taps.weights[i] = min(np.int64(fraction * (1 << FRACTION) + 0.5), (1 << FRACTION) - 1)


@exact
def fill_taps(taps: Taps, length: Integer, size: Integer, interpolation: Integer) -> None:
    """Fills in all weights, for `count_taps` pixels each: to the bit those of Pillow's `precompute_coeffs`."""
    ratio = length / size
    stretch = max(ratio, 1.0)
    support = (2 if interpolation == BICUBIC else 1) * stretch
    count = count_taps(length, size, interpolation)
    row = np.empty(count, np.float64)
    taps.weights[: 2 * count * len(taps.start)] = 0
    for i in range(len(taps.start)):
        centre = (min(i, size - 1) + 0.5) * ratio
        start = max(0, np.int64(centre - support + 0.5))
        inside = min(count, min(length, np.int64(centre + support + 0.5)) - start)
        total = 0.0
        for k in range(inside):
            row[k] = weight_at((k + start - centre + 0.5) * (1.0 / stretch), interpolation)
            total += row[k]
        for k in range(inside):
            share = row[k] / total * (1 << WEIGHT_BITS)
            weight = np.int64(share - 0.5) if share < 0 else np.int64(share + 0.5)
            at = 2 * (count * i + k - k % 2) + k % 2
            high = (weight + (1 << LOW_BITS - 1)) >> LOW_BITS
            taps.weights[at] = high
            taps.weights[at + 2] = weight - (high << LOW_BITS)
        taps.start[i] = start
