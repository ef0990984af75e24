"""Affine moves on CPUs: turn, shift, scale and shear about the image's centre, compiled."""

import math

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.numba_jit import Bytes, Floats, Integer, Real, exact, fast
from kilobatch.data.views.columns import ANGLE, SCALE, SHEAR, SHIFT_X, SHIFT_Y

Matrix = tuple[Real, Real, Real, Real, Real, Real]


@exact
def matrix(drawn: NDArray[np.float64], height: Integer, width: Integer) -> Matrix:
    """(a, b, c, d, e, f): pixel (x, y) of the moved image shows (a x + b y + c, d x + e y + f) of the image.

    The inverse of: centre, shear along x, turn, scale, back, shift; torchvision's `affine`. drawn: as draw_all has it.
    """
    angle = math.radians(drawn[ANGLE])
    scale, shear = drawn[SCALE], drawn[SHEAR]
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    a, b = cos - sin * shear, cos * shear + sin
    d, e = -sin, cos
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    from_x = middle_x + drawn[SHIFT_X] * width
    from_y = middle_y + drawn[SHIFT_Y] * height
    return a, b, middle_x - a * from_x - b * from_y, d, e, middle_y - d * from_x - e * from_y


@fast
def move(image: Bytes, to_pixel: Matrix, fill: Real, planes: Floats) -> None:
    """(H, W, 3) bytes -> planes (3, H * W) of the moved image, read bilinearly; outside the image pixels are `fill`."""
    height, width, _ = image.shape
    a, b, c, d, e, f = to_pixel
    for y in range(height):
        for x in range(width):
            from_x, from_y = a * x + b * y + c, d * x + e * y + f
            left, top = np.int64(math.floor(from_x)), np.int64(math.floor(from_y))
            right, below = np.float32(from_x - left), np.float32(from_y - top)
            inside = 0 <= left < width - 1 and 0 <= top < height - 1
            for channel in range(3):
                if inside:
                    nw, ne = image[top, left, channel], image[top, left + 1, channel]
                    sw, se = image[top + 1, left, channel], image[top + 1, left + 1, channel]
                    upper, lower = lerp(nw, ne, right), lerp(sw, se, right)
                else:
                    upper = lerp(at(image, top, left, channel, fill), at(image, top, left + 1, channel, fill), right)
                    bottom = top + 1
                    lower = lerp(
                        at(image, bottom, left, channel, fill), at(image, bottom, left + 1, channel, fill), right
                    )
                planes[channel, y * width + x] = lerp(upper, lower, below)


@fast
def lerp(start: Real, end: Real, weight: Real) -> Real:
    return np.float32(start) + (np.float32(end) - np.float32(start)) * weight


@fast
def at(image: Bytes, y: Integer, x: Integer, channel: Integer, fill: Real) -> Real:
    """A pixel of the image, or `fill` where (y, x) lies outside."""
    if 0 <= y < image.shape[0] and 0 <= x < image.shape[1]:
        return np.float32(image[y, x, channel])
    return np.float32(fill)
