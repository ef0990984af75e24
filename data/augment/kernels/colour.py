"""Kernels of the colour operations, and of the mean grey that contrast needs; a program works on pixels of one image.

The operations and their numbers are those of torch_ops.py. Images are bytes in any layout in which the pixels of a
channel are equally far apart: channels first or last. Each image has a row of parameters, which says what is done.
"""

import triton
import triton.language as tl

from kilobatch.data.views.columns import DO_BRIGHTNESS, DO_CONTRAST, DO_HUE, DO_SATURATION, GREY_WEIGHTS

# Columns of an image's parameters
ORDER, FACTORS, GREYED, THRESHOLD, BORDER, PARAMETERS = 0, 1, 5, 6, 7, 8
NO_ORDER = -1.0  # of an image without jitter; else bits 2i and 2i + 1 hold the operation at place i

_ORDER, _FACTORS, _GREYED, _THRESHOLD, _PARAMETERS = (
    tl.constexpr(x) for x in (ORDER, FACTORS, GREYED, THRESHOLD, PARAMETERS)
)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = (
    tl.constexpr(x) for x in (DO_BRIGHTNESS, DO_CONTRAST, DO_SATURATION, DO_HUE)
)
_RED, _GREEN, _BLUE = (tl.constexpr(x) for x in GREY_WEIGHTS)


@triton.jit
def load_pixels(images, image, p, pixels, of_image, of_channel, of_pixel):
    """Pixels p of an image -> three channels, fp32 in 0..255."""
    at = images + image * of_image + p.to(tl.int64) * of_pixel
    inside = p < pixels
    r = tl.load(at, mask=inside, other=0).to(tl.float32)
    g = tl.load(at + of_channel, mask=inside, other=0).to(tl.float32)
    b = tl.load(at + 2 * of_channel, mask=inside, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def near(place):
    """1 within one sextant of 0 on the colour circle, 0 from a distance of two on, linear between."""
    distance = tl.abs(place - 6 * tl.floor(place * (1 / 6) + 0.5))
    return tl.clamp(2 - distance, 0.0, 1.0)


@triton.jit
def jitter(r, g, b, parameters, mean, UNTIL_CONTRAST: tl.constexpr):
    """The four operations in the image's own order; UNTIL_CONTRAST: only those before contrast."""
    order = tl.load(parameters + _ORDER).to(tl.int32)
    go = order >= 0
    for place in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
        operation = (order >> (2 * place)) & 3
        factor = tl.load(parameters + _FACTORS + operation)
        if UNTIL_CONTRAST:
            go = go & (operation != _CONTRAST)
        if go:
            if operation == _HUE:
                high, low = tl.maximum(r, tl.maximum(g, b)), tl.minimum(r, tl.minimum(g, b))
                chroma = high - low
                per = 1.0 / tl.maximum(chroma, 1e-6)
                turned = tl.where(high == g, (b - r) * per + 2, (r - g) * per + 4)
                turned = tl.where(high == r, (g - b) * per, turned) + 6 * factor
                r = low + chroma * near(turned)
                g = low + chroma * near(turned - 2)
                b = low + chroma * near(turned - 4)
            else:
                towards = tl.zeros_like(r)
                if operation == _SATURATION:
                    towards = _RED * r + _GREEN * g + _BLUE * b
                if operation == _CONTRAST:
                    towards += mean
                r = tl.clamp(towards + factor * (r - towards), 0.0, 255.0)
                g = tl.clamp(towards + factor * (g - towards), 0.0, 255.0)
                b = tl.clamp(towards + factor * (b - towards), 0.0, 255.0)
    return r, g, b


@triton.jit
def finish(x, threshold, mean, std):
    """Solarizes and normalises."""
    return (tl.where(x >= threshold, 255 - x, x) - mean) / std


@triton.jit
def grey_means(images, parameters, which, means, pixels, of_image, of_channel, of_pixel, BLOCK: tl.constexpr):
    """Sets means[image], for the images `which`, to the mean grey before contrast. One program for each image."""
    image = tl.load(which + tl.program_id(0))
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, pixels, BLOCK):
        p = first + tl.arange(0, BLOCK)
        r, g, b = load_pixels(images, image, p, pixels, of_image, of_channel, of_pixel)
        own = parameters + image * _PARAMETERS
        r, g, b = jitter(r, g, b, own, 0.0, True)  # pyright: ignore[reportArgumentType]
        total += tl.where(p < pixels, _RED * r + _GREEN * g + _BLUE * b, 0.0)
    tl.store(means + image, tl.sum(total, 0) / pixels)


@triton.jit
def colour(
    images, parameters, which, means, out, pixels, of_image, of_channel, of_pixel, out_image, out_channel, out_pixel,
    mean_r, mean_g, mean_b, std_r, std_g, std_b, FINISH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Jitters and greys the images `which`. FINISH: solarizes and normalises them, too, and stores them as
    those images of `out`; else they are stored one after the other."""
    slot = tl.program_id(0)
    image = tl.load(which + slot)
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    r, g, b = load_pixels(images, image, p, pixels, of_image, of_channel, of_pixel)
    own = parameters + image * _PARAMETERS
    mean = tl.load(means + image)
    r, g, b = jitter(r, g, b, own, mean, False)  # pyright: ignore[reportArgumentType]
    if tl.load(own + _GREYED) > 0:
        r = _RED * r + _GREEN * g + _BLUE * b
        g = r
        b = r
    if FINISH:
        threshold = tl.load(own + _THRESHOLD)
        r = finish(r, threshold, mean_r, std_r)
        g = finish(g, threshold, mean_g, std_g)
        b = finish(b, threshold, mean_b, std_b)
        at = out + image * out_image
    else:
        at = out + slot.to(tl.int64) * out_image
    at += p.to(tl.int64) * out_pixel
    inside = p < pixels
    tl.store(at, r, mask=inside)
    tl.store(at + out_channel, g, mask=inside)
    tl.store(at + 2 * out_channel, b, mask=inside)
