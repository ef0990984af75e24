"""Colour operations on CPUs: compiled loops over planes of float32 in 0..255, in place.

torchvision's definitions on float images (no rounding to bytes between operations), written without branches, so that
the compiler vectorises them. Each plane is a contiguous row of pixels of one channel; they may be a part of an image.
"""

import numpy as np

from kilobatch.data.numba_jit import Bytes, Floats, Real, Whole, fast
from kilobatch.data.views.columns import DO_BRIGHTNESS, DO_CONTRAST, DO_SATURATION

ZERO, ONE, TWO, FOUR, SIX, FULL = (np.float32(x) for x in (0, 1, 2, 4, 6, 255))
SIXTH, HALF = np.float32(1 / 6), np.float32(0.5)
RED, GREEN, BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # of a pixel's grey
FLAT = np.float32(1e-6)  # a smaller difference between the channels is no colour


@fast
def load(image: Bytes, r: Floats, g: Floats, b: Floats) -> None:
    """Bytes (3 * pixels,) red, green, blue, red, ... to three planes."""
    for x in range(len(r)):
        r[x] = np.float32(image[3 * x])
        g[x] = np.float32(image[3 * x + 1])
        b[x] = np.float32(image[3 * x + 2])


@fast
def adjust(operation: Whole, factor: Real, mean: Real, r: Floats, g: Floats, b: Floats) -> None:
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
    """Brightness (towards 0) and contrast (towards the mean grey)."""
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

    In sextants, a channel is at its highest within 1 of its place on the circle (red 0, green 2, blue 4), at its lowest
    from 2 on, and linear between.
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
        r[x] = low + chroma * near(place)
        g[x] = low + chroma * near(place - TWO)
        b[x] = low + chroma * near(place - FOUR)


@fast
def near(place: Real) -> Real:
    """1 within one sextant of 0 on the circle, 0 from two on, linear between."""
    away = abs(place - SIX * np.floor(place * SIXTH + HALF))
    return min(max(TWO - away, ZERO), ONE)


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
