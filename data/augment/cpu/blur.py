"""Gaussian blur on CPUs: separable, compiled, one plane of float32 at a time.

The plane is copied into the middle of a larger one, whose rim holds what lies beyond the border. Then both passes run
over that as one long row, in which a horizontal neighbour is `tap` elements away and a vertical one `tap * pitch`: no
loop has to test for an edge.
"""

import math

import numpy as np

from kilobatch.data.numba_jit import Floats, Integer, Real, fast
from kilobatch.data.views.columns import REFLECT, ZERO

REACH = 3.0  # in sigmas; all taps beyond weigh 0.3 % together and are left out
BAND = 2048  # elements: the sums of a band (8 KiB) stay in the first-level cache from one pair of taps to the next


@fast
def taps(sigma: Real, radius: Integer) -> Floats:
    """(reach + 1,) weights of the taps 0, 1, ... to one side, for a kernel of at most this radius; reach <= radius."""
    reach = min(radius, np.int64(math.ceil(REACH * sigma)))
    weights = np.empty(reach + 1, np.float64)
    total = 0.0
    for tap in range(reach + 1):
        weights[tap] = math.exp(-0.5 * (tap / sigma) ** 2)
        total += weights[tap] * (1 if tap == 0 else 2)
    return (weights / total).astype(np.float32)


@fast
def blur(plane: Floats, height: Integer, width: Integer, weights: Floats, border: Real, scratch: Floats) -> None:
    """Blurs one plane (height * width,), in place. border: REFLECT, ZERO or EDGE.

    scratch holds at least 2 * (height + 2 * reach) * (width + 2 * reach) elements, reach = len(weights) - 1.
    """
    reach = len(weights) - 1
    pitch = width + 2 * reach
    length = (height + 2 * reach) * pitch
    padded, horizontal = scratch[:length], scratch[length : 2 * length]
    pad(plane, height, width, reach, border, padded)
    convolve(padded, horizontal, weights, 1, reach, length - reach)
    first = reach * pitch + reach
    convolve(horizontal, padded, weights, pitch, first, length - first)
    for y in range(height):
        copy(padded[first + y * pitch :], plane[y * width : (y + 1) * width])


@fast
def pad(plane: Floats, height: Integer, width: Integer, reach: Integer, border: Real, padded: Floats) -> None:
    """Copies the plane into the middle of `padded`, and around it what lies beyond the border.

    REFLECT: its reflection, which does not repeat the edge itself; EDGE: the edge again and again; ZERO: zeros.
    """
    pitch = width + 2 * reach
    for row in range(height + 2 * reach):
        y = row - reach
        target = padded[row * pitch : (row + 1) * pitch]
        if border == ZERO and (y < 0 or y >= height):
            fill(target, 0)
            continue
        y = reflect(y, height) if border == REFLECT else min(max(y, 0), height - 1)
        copy(plane[y * width :], target[reach : reach + width])
        if border == REFLECT:
            for x in range(1, reach + 1):
                target[reach - x] = target[reach + x]
                target[reach + width - 1 + x] = target[reach + width - 1 - x]
        else:
            fill(target[:reach], 0 if border == ZERO else target[reach])
            fill(target[reach + width :], 0 if border == ZERO else target[reach + width - 1])


@fast
def fill(target: Floats, value: Real) -> None:
    for x in range(len(target)):
        target[x] = value


@fast
def copy(source: Floats, target: Floats) -> None:
    """Fills target. numba's own slice assignment is three times as slow."""
    for x in range(len(target)):
        target[x] = source[x]


@fast
def reflect(y: Integer, height: Integer) -> Integer:
    y = -y if y < 0 else y
    return 2 * (height - 1) - y if y >= height else y


@fast
def convolve(source: Floats, target: Floats, weights: Floats, stride: Integer, first: Integer, last: Integer) -> None:
    """target[i] for first <= i < last: the sum of weights[t] * (source[i - t * stride] + source[i + t * stride]).

    Two taps at once, since reading and writing the sums takes as long as reading their neighbours.
    """
    taps = len(weights) - 1
    for start in range(first, last, BAND):
        n = min(BAND, last - start)
        sums, middle, centre = target[start : start + n], source[start : start + n], weights[0]
        if taps == 0:
            for i in range(n):
                sums[i] = centre * middle[i]
        elif taps % 2 == 1:
            before, behind, u = source[start - stride :], source[start + stride :], weights[1]
            for i in range(n):
                sums[i] = centre * middle[i] + u * (before[i] + behind[i])
        for tap in range(1 + taps % 2, taps, 2):
            near, far = tap * stride, (tap + 1) * stride
            before, behind, u = source[start - near :], source[start + near :], weights[tap]
            ahead, after, v = source[start - far :], source[start + far :], weights[tap + 1]
            if tap == 1:
                for i in range(n):
                    sums[i] = centre * middle[i] + u * (before[i] + behind[i]) + v * (ahead[i] + after[i])
            else:
                for i in range(n):
                    sums[i] += u * (before[i] + behind[i]) + v * (ahead[i] + after[i])
