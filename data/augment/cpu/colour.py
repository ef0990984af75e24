"""Colour operations on CPUs: compiled loops over planes of float32 in 0..255, in place.

torchvision's definitions on float images (no rounding to bytes between operations), written without branches, so that
the compiler vectorises them. A plane is a contiguous row of pixels of one channel, and may be a part of an image.
"""

import numpy as np

from kilobatch.data.numba_jit import Bytes, Floats, Integer, Real, fast
from kilobatch.data.views.columns import DO_BRIGHTNESS, DO_CONTRAST, DO_SATURATION, GREY_WEIGHTS

ZERO, ONE, TWO, THREE, FOUR, SIX, FULL = (np.float32(x) for x in (0, 1, 2, 3, 4, 6, 255))
SIXTH = np.float32(1 / 6)
RED, GREEN, BLUE = (np.float32(weight) for weight in GREY_WEIGHTS)
FLAT = np.float32(1e-6)  # a smaller difference between the channels counts as no colour


@fast
def load_planes(image: Bytes, r: Floats, g: Floats, b: Floats) -> None:
    """Splits bytes (3 * pixels,), red, green, blue, red, ..., into three planes."""
    for x in range(len(r)):
        r[x] = np.float32(image[3 * x])
        g[x] = np.float32(image[3 * x + 1])
        b[x] = np.float32(image[3 * x + 2])


@fast
def adjust(operation: Integer, factor: Real, mean: Real, r: Floats, g: Floats, b: Floats) -> None:
    """One jitter operation; `mean` is the whole image's mean grey, which contrast needs."""
    f = np.float32(factor)
    if operation == DO_BRIGHTNESS:
        towards(f, ZERO, r, g, b)
    elif operation == DO_CONTRAST:
        towards(f, np.float32(mean), r, g, b)
    elif operation == DO_SATURATION:
        saturation(f, r, g, b)
    else:
        hue(f, r, g, b)


@fast
def towards(factor: Real, value: Real, r: Floats, g: Floats, b: Floats) -> None:
    """Brightness (towards 0) and contrast (towards the image's mean grey)."""
    rest = (ONE - factor) * value
    for x in range(len(r)):
        r[x] = min(max(factor * r[x] + rest, ZERO), FULL)
        g[x] = min(max(factor * g[x] + rest, ZERO), FULL)
        b[x] = min(max(factor * b[x] + rest, ZERO), FULL)


@fast
def saturation(factor: Real, r: Floats, g: Floats, b: Floats) -> None:
    for x in range(len(r)):
        rest = (ONE - factor) * (RED * r[x] + GREEN * g[x] + BLUE * b[x])
        r[x] = min(max(factor * r[x] + rest, ZERO), FULL)
        g[x] = min(max(factor * g[x] + rest, ZERO), FULL)
        b[x] = min(max(factor * b[x] + rest, ZERO), FULL)


@fast
def hue(turns: Real, r: Floats, g: Floats, b: Floats) -> None:
    """Turns colours around the circle, through HSV.

    The circle is measured in sextants. A channel is highest within 1 of its own place (red 0, green 2, blue 4), lowest
    from a distance of 2 on, and linear between.
    """
    shift = SIX * turns
    for x in range(len(r)):
        red, green, blue = r[x], g[x], b[x]
        high = max(red, max(green, blue))
        low = min(red, min(green, blue))
        chroma = high - low
        per = ONE / max(chroma, FLAT)
        place = (red - green) * per + FOUR
        place = (blue - red) * per + TWO if high == green else place
        place = (green - blue) * per if high == red else place
        place = place + shift
        place = place - SIX * np.floor(place * SIXTH)  # from 0 to 6: red's own place is at both ends
        r[x] = low + chroma * part(abs(place - THREE) - ONE)
        g[x] = low + chroma * part(TWO - abs(place - TWO))
        b[x] = low + chroma * part(TWO - abs(place - FOUR))


@fast
def part(x: Real) -> Real:
    """The nearest number from 0 to 1."""
    return min(max(x, ZERO), ONE)


@fast
def grey(r: Floats, g: Floats, b: Floats) -> None:
    for x in range(len(r)):
        level = RED * r[x] + GREEN * g[x] + BLUE * b[x]
        r[x] = level
        g[x] = level
        b[x] = level


@fast
def grey_sum(r: Floats, g: Floats, b: Floats) -> Real:
    total = ZERO
    for x in range(len(r)):
        total += RED * r[x] + GREEN * g[x] + BLUE * b[x]
    return np.float64(total)


@fast
def finish(plane: Floats, threshold: Real, mean: Real, std: Real) -> None:
    """Solarizes (a threshold above 255 inverts nothing) and normalises one channel."""
    per = ONE / std
    for x in range(len(plane)):
        value = plane[x]
        value = FULL - value if value >= threshold else value
        plane[x] = (value - mean) * per
